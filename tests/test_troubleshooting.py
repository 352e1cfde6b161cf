"""Every error message of the source stands in docs/troubleshooting.md, under a heading with cause and remedy."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdexport"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Functions that return what is wrong with a row as a text, which `data.sources` raises.
JUDGES = {"check", "canonical"}
READER = PACKAGE / "data" / "read.py"
ANY = "\0"  # stands for a value in a message


def error_names() -> set[str]:
    """The subclasses of KdexportError, wherever they are."""
    classes = [
        (node.name, {base.id for base in node.bases if isinstance(base, ast.Name)})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    found = {"KdexportError"}
    while new := {name for name, bases in classes if bases & found} - found:
        found |= new
    return found - {"MissingPackage"}  # its one message is in errors.py


def messages() -> Iterator[tuple[str, str]]:
    """Each place where an error is made, with a message that it may have; `ANY` stands for values in it."""
    names = error_names()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path == READER:
            yield from faults_of_rows(tree)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            for node in ast.walk(function):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                    yield from ((where, text) for text in templates(node.args[0], function))
                judges = function.name in JUDGES and path.is_relative_to(PACKAGE / "tasks")
                if judges and isinstance(node, ast.Return) and node.value is not None:
                    yield from ((where, text) for text in templates(node.value, function))


def faults_of_rows(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What the reader puts in the place of a row that it can't read."""
    nobody = ast.parse("def nobody(): ...").body[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and isinstance(nobody, ast.FunctionDef):
            texts = [text for text in templates(node, nobody) if text.startswith("it ") and len(text) > 8]
            yield from ((f"{READER.relative_to(ROOT)}:{node.lineno}", text) for text in texts)


def templates(node: ast.AST, function: ast.FunctionDef | ast.AsyncFunctionDef, depth: int = 0) -> list[str]:
    """The texts that an expression may have."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=values):
            found = [""]
            for value in values:
                inner = isinstance(value, ast.FormattedValue)
                parts = {*templates(value.value, function, depth)} if inner else {value.value}
                found = [before + part for before in found for part in parts]
            return found
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [a + b for a in templates(left, function) for b in templates(right, function)]
        case ast.IfExp(body=one, orelse=other):
            return [*templates(one, function, depth), *templates(other, function, depth)]
        case ast.Name(id=name) if depth == 0:
            return assigned(name, function) or [ANY]
    return [ANY]


def assigned(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The texts that a function gives to a name, before it appends to it."""
    found, appended = list[str](), ""
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                found += templates(value, function, 1)
            case ast.AugAssign(target=ast.Name(id=target)) if target == name:
                appended = ANY
    return [text + appended for text in found]


MESSAGES = {text: where for where, text in messages() if re.search("[A-Za-z]{3}", text)}
# Messages whose words come from elsewhere: msgspec's, the server's, and those put together from a row and its fault.
OF_OTHERS = [
    f"{ANY}: {ANY}: expected {ANY}, got {ANY}", f'{{"error": {ANY}}}', f"{ANY}, row {ANY}: {ANY}",
    f"tag {ANY} of word {ANY} is none of O, B-… and I-…",
]  # fmt: skip


def sections() -> list[tuple[str, list[str], str]]:
    """The page's entries: heading, messages, and the prose around them."""
    found = []
    for section in re.split(r"^### ", PAGE, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        body = re.split(r"^## ", body, flags=re.M)[0]
        found.append((heading, re.findall(r"^- `(.+)`$", body, re.M), re.sub(r"^- `.*$", "", body, flags=re.M)))
    return found


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(re.escape(" ".join(message.split())).replace(ANY, ".*"))


def test_every_error_message_is_explained():
    shown = [message for _, listed, _ in sections() for message in listed]
    missing = [
        f"{where}: {m.replace(ANY, '…')}" for m, where in MESSAGES.items() if not any(map(pattern(m).fullmatch, shown))
    ]
    assert missing == [], "docs/troubleshooting.md has no entry for these"


def test_no_message_is_explained_that_is_gone():
    patterns = [pattern(message) for message in [*MESSAGES, *OF_OTHERS]]
    for _, listed, _ in sections():
        for shown in listed:
            assert any(one.fullmatch(shown) for one in patterns), shown


def test_every_entry_has_a_cause_and_a_remedy():
    for heading, listed, prose in sections():
        assert listed, f"{heading} explains no message"
        assert len(prose.split()) >= 15, f"{heading} has no cause and remedy"
