"""Near duplicates that are found and no others; confidence that gives rows away, or doesn't."""

import sys

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdexport import spec
from kdexport.analysis import sampled
from kdexport.analysis.duplicates import audit, jaccard, near_duplicates, shingles
from kdexport.analysis.membership import membership
from kdexport.data import demo, prepare, read_summary
from kdexport.errors import MissingPackage
from kdexport.report.membership import leakage
from kdexport.report.membership import near_duplicates as near_section
from kdexport.report.page import Page, html, markdown
from kdexport.report.quality import classes
from kdexport.report.sections import SECTIONS
from kdexport.results import ClassScore, Conditions, Evidence, Report
from kdexport.tasks.config import TaskConfig
from kdexport.tasks.text_classification import TextClassification

content = TextClassification.content


def rows(split, *texts, label="a"):
    return [{"id": f"{split}.csv:{i}", "text": text, "label": label} for i, text in enumerate(texts, 1)]


def splits(**texts):
    return {split: rows(split, *texts.get(split, ())) for split in ("train", "validation", "test")}


# --- near duplicates


def test_jaccard_is_that_of_the_sets_of_four_characters():
    def runs(text):
        return {text[i : i + 4] for i in range(len(text) - 3)}

    one, other = "Who  made you", "so who made\tyou, Ålesund \U0001f600"
    a, b = runs(" who made you "), runs(" so who made you, ålesund \U0001f600 ")
    assert len(shingles(one)) == len(a)
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(len(a & b) / len(a | b))
    assert len(shingles("")) == len(shingles("i")) == 1
    assert jaccard(shingles("i"), shingles("I")) == 1.0
    assert jaccard(shingles("!"), shingles("?")) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("can you play music by led zepplin", "can you play music by led zeppelin", True),
        ("i need to pay my electric bill", "I need to pay my  electric bill.", True),
        ("what pets do you have", "so what pets do you have", True),
        ("is it going to rain tomorrow in paris", "is it going to snow tomorrow in paris", False),
        ("can i use butter instead of margarine", "can i use margarine instead of butter", False),
        ("ok", "OK", True),
        ("yes", "no", False),
        ("\U0001f600", "\U0001f622", False),
    ],
)
def test_short_texts_are_near_when_a_reader_would_say_so(one, other, near):
    found, pairs = near_duplicates(splits(train=[one], test=[other]), content)
    assert found.across["train–test"] == len(pairs) == near


def test_texts_are_counted_once_for_each_earlier_split_and_equal_ones_not_at_all():
    a, b, c = (f"my order of last {day} has not arrived yet" for day in ("monday", "mondays", "monday's"))
    found, pairs = near_duplicates(
        splits(train=[a, b, "something else"], validation=[c, c], test=[b, c.upper(), "wholly different"]), content
    )
    assert found.compared == {"train": 3, "validation": 1, "test": 3}
    assert found.within == {"train": 1, "validation": 0, "test": 1}
    assert found.across == {"train–validation": 1, "train–test": 2, "validation–test": 2}
    assert len(pairs) == 5
    alone, _ = near_duplicates(splits(train=[a, "something else"], test=[a, "wholly different"]), content)
    assert alone.across["train–test"] == 0


def test_a_pair_says_where_its_rows_are_and_labels_that_conflict_come_first():
    near = "i want to know how many vacation days i have"
    found, pairs = near_duplicates(
        {
            "train": [*rows("train", "unlike", near, near), *rows("more", "what is the square root of 36", label=None)],
            "validation": [],
            "test": rows("test", "What is the square root of 36", f"{near} used", f"{near}!", label="b"),
        },
        content,
    )
    first = found.examples[0]
    assert first.ids == ("train.csv:2", "test.csv:3")
    assert first.labels == ("a", "b")
    assert first.texts == (near, f"{near}!")
    assert first.splits == ("train", "test")
    assert [pair.labels for pair in found.examples] == [("a", "b"), ("a", "b"), (None, "b")]
    assert found.conflicting_labels == 2
    assert all(pair.similarity == round(jaccard(*map(shingles, pair.texts)), 3) >= 0.8 for pair in pairs)


def test_rows_without_a_label_conflict_with_none():
    _, found = audit({"train": rows("t", "x", "x", label=None), "test": rows("s", "x", "y")}, content, drop=False)
    assert found.conflicting_labels == 0
    _, found = audit({"train": rows("t", "x", label="b"), "test": rows("s", "x", "y")}, content, drop=False)
    assert found.conflicting_labels == 1


def test_next_to_all_pairs_are_found_that_comparing_each_with_each_finds(articles):
    random = np.random.default_rng(0)
    texts = [row["text"][:400] for row in articles[:150]]
    for text in texts[:60]:  # with a part put in, of a length that leaves them about 0.8 alike
        at, more = random.integers(100, 300), articles[200]["text"][: random.integers(40, 120)]
        texts.append(text[:at] + more + text[at:])
    found, _ = near_duplicates(splits(train=texts), content)
    sets = [shingles(text) for text in texts]
    near = [any(jaccard(sets[i], sets[j]) >= 0.8 for j in range(i)) for i in range(len(texts))]
    assert 10 < sum(near) < 60
    assert 0.97 * sum(near) <= found.within["train"] <= sum(near)


def test_texts_of_one_template_are_all_counted_though_few_of_them_are_compared(monkeypatch):
    compared = []
    monkeypatch.setattr("kdexport.analysis.duplicates.jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    texts = [
        f"dear customer, your code for the login to the portal is {i * 7919 % 10**4:04d}, it is valid for ten minutes"
        for i in range(900)
    ]
    texts[600:603] = [f"{text}!" for text in texts[10:13]]
    found, pairs = near_duplicates(splits(train=texts[:600], test=texts[600:]), content)
    assert found.across["train–test"] == 300
    nearest = {pair.ids[1]: pair.ids[0] for pair in pairs}
    assert [nearest[f"test.csv:{i}"] for i in (1, 2, 3)] == ["train.csv:11", "train.csv:12", "train.csv:13"]
    assert found.within == {"train": 599, "validation": 0, "test": 299}
    assert len(compared) <= 10 * (900 + 300)  # each with each would be 400,000


def test_of_more_texts_than_can_be_looked_at_some_are_and_it_is_said(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("kdexport.analysis.duplicates._MOST", 10)
    texts = [f"{word} is text number {i}" for i, word in enumerate(["quite", "another"] * 12)]
    found, _ = near_duplicates(splits(train=texts, test=["new"]), content)
    assert found.compared == {"train": 9, "test": 1}
    assert found.texts == {"train": 24, "validation": 0, "test": 1}
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))
    settings = spec.load(None, {"data.train": str(tmp_path / "t.csv"), "teacher.model": "t"}).data
    prepare(settings, "text-classification", 0, tmp_path)
    said = " ".join(capfd.readouterr().err.split())
    assert f"random sample of train: 4 of {read_summary(tmp_path).rows['train']} texts" in said
    assert read_summary(tmp_path).duplicates.near.texts["train"] > 10


def test_without_datasketch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingPackage, match=r"'datasketch' is not installed. .*kdexport\[distill\]"):
        near_duplicates(splits(train=["a"]), content)


def test_bbc_news_has_articles_under_two_headlines(tmp_path, capfd):
    demo.write_bbc_news(tmp_path / "bbc.jsonl")
    settings = spec.load(None, {"data.train": str(tmp_path / "bbc.jsonl"), "teacher.model": "t"}).data
    prepare(settings, "text-classification", 0, tmp_path)
    found = read_summary(tmp_path).duplicates
    assert found.duplicates == 98
    assert sum(found.across.values()) == 0
    assert sum(found.near.across.values()) + sum(found.near.within.values()) > 50
    assert found.near.across["train–test"] >= 15
    assert f"{found.near.across['train–test']} texts of test in train" in capfd.readouterr().err
    lines = (tmp_path / "near_duplicates.jsonl").read_bytes().splitlines()
    assert len(lines) == sum(found.near.across.values())
    assert {tuple(msgspec.json.decode(line)["splits"]) for line in lines} >= {("train", "test")}


# --- membership


@pytest.fixture(scope="module")
def task():
    return TextClassification(
        TaskConfig(task=TextClassification.name, labels=["a", "b"], inputs=["input_ids"], max_length=8),
        Tokenizer(WordLevel()),
    )


def logits(random, n, sure):
    return np.stack([random.normal(sure, 1, n), np.zeros(n)], axis=1).astype(np.float32)


def test_a_model_that_is_as_sure_of_both_gives_nothing_away(task):
    random = np.random.default_rng(1)
    train, test = rows("train", *map(str, range(800))), rows("test", *(f"t{i}" for i in range(500)))
    found = membership(task, train, logits(random, 800, 2), test, logits(random, 500, 2))
    for attack in (found.by_confidence, found.by_label):
        assert attack.ci95[0] < 0.5 < attack.ci95[1]
        assert attack.advantage < attack.by_chance < 0.1
        assert (attack.members, attack.others) == (800, 500)


def test_a_model_that_is_surer_of_what_it_learned_gives_it_away_by_the_label_most(task):
    random = np.random.default_rng(2)
    train, test = rows("train", *map(str, range(800))), rows("test", *(f"t{i}" for i in range(500)))
    learned, new = logits(random, 800, 3), logits(random, 500, 1)
    found = membership(task, train, learned, test, new)
    assert found.by_label.auc == pytest.approx(0.92, abs=0.02)  # Φ(2 / √2)
    assert found.by_label.auc > found.by_confidence.auc > 0.8
    assert found.by_label.ci95[0] > 0.9
    turned = membership(task, train, learned[:, ::-1], test, new[:, ::-1])
    assert turned.by_confidence.auc == pytest.approx(found.by_confidence.auc)
    assert turned.by_label.auc == pytest.approx(1 - found.by_label.auc)
    assert found.by_label.advantage == pytest.approx(0.68, abs=0.04)  # 2 Φ(1) − 1


def test_the_attack_by_label_is_on_labelled_rows_alone(task):
    random = np.random.default_rng(3)
    bare, labelled = rows("bare", "x", "y", "z", label=None), rows("train", *map(str, range(40)))
    test, others = rows("test", "s", "t"), logits(random, 2, 1)
    found = membership(task, bare + labelled, logits(random, 43, 2), test, others)
    assert (found.by_confidence.members, found.by_label.members) == (43, 40)
    assert membership(task, bare, logits(random, 3, 2), test, others).by_label is None


def test_test_rows_that_were_trained_on_are_no_others(task):
    random = np.random.default_rng(4)
    train, test = rows("train", "x", "y", "z"), rows("test", "x", "new")
    found = membership(task, train, logits(random, 3, 2), test, logits(random, 2, 2))
    assert found.by_confidence.others == found.by_label.others == 1
    assert membership(task, train, logits(random, 3, 2), test[:1], logits(random, 1, 2)) is None
    assert membership(task, [], logits(random, 0, 2), test, logits(random, 2, 2)) is None
    with pytest.raises(ValueError, match="are not of these rows"):
        membership(task, train, logits(random, 2, 2), test, logits(random, 2, 2))


def test_the_sample_of_members_is_the_same_for_everyone_who_asks():
    assert sampled(3) == [0, 1, 2]
    assert sampled(20_000) == sampled(20_000) == sorted(set(sampled(20_000)))
    assert len(sampled(20_000)) == 5000
    assert max(sampled(20_000)) > 19_900
    assert sampled(100, 5) != [0, 1, 2, 3, 4]


# --- the report


def attack(auc, low, high):
    return {"auc": auc, "ci95": [low, high], "advantage": 0.1, "by_chance": 0.05, "members": 900, "others": 400}


def report(**found):
    return Report(
        kdexport="", task="text-classification", metric="accuracy", labels=["a"], recommended=None, reason="",
        variants=[], bench=Conditions(rounds=1, round_seconds=1, rows=1, clock=""), environment={}, leakage=found,
    )  # fmt: skip


@pytest.fixture(scope="module")
def audited():
    near = "i want to know how many vacation days i have"
    given = splits(train=["x", near, "unlike | it"], validation=["x"], test=["x", f"{near} <b>", "y"])
    places, found = audit(given, content, drop=True)
    kept = {split: [given[split][i] for i in places[split]] for split in given}
    return msgspec.to_builtins(msgspec.structs.replace(found, near=near_duplicates(kept, content)[0]))


def test_the_section_says_what_was_found_and_what_it_means(audited):
    attacks = {
        "teacher": {"by_confidence": attack(0.504, 0.48, 0.53), "by_label": None},
        "student": {"by_confidence": attack(0.561, 0.53, 0.59), "by_label": attack(0.58, 0.55, 0.61)},
    }
    section = leakage(report(**audited, membership=attacks))
    assert (
        "In 3 cases a text stood word for word in two splits; they were dropped from the earlier one." in section.lead
    )
    assert "Test texts with a near duplicate in train: 1 of 3 (33.3 %); no labels conflict." in section.lead
    assert "in 50 of 100 cases (95 % interval 48 to 53), not significantly more than the 50 of chance" in section.lead
    assert "in 56 of 100 cases (95 % interval 53 to 59); chance gives 50." in section.lead
    assert section.tables[0].rows[1] == ("train–test", "1", "1")
    table = section.figures[0].table.rows
    assert [row[:3] for row in table] == [
        ("teacher", "confidence", "0.504 [0.480–0.530]"),
        ("student", "confidence", "0.561 [0.530–0.590]"),
        ("student", "probability of the label", "0.580 [0.550–0.610]"),
    ]
    below = leakage(report(membership={"student": {"by_confidence": attack(0.4, 0.37, 0.43), "by_label": None}}))
    assert "train and test differ in kind" in below.lead


def test_a_row_of_the_table_has_its_own_id_label_and_text_first():
    given = {
        "train": rows("train", "where is my parcel"),
        "validation": [],
        "test": rows("test", "Where is my parcel?"),
    }
    given["test"][0]["label"] = "b"
    near, _ = near_duplicates(given, content)
    (row,) = near_section(report(near=msgspec.to_builtins(near))).tables[0].rows
    assert row == (
        "test.csv:1", "train.csv:1", f"{near.examples[0].similarity:.2f}", "b ≠ a", "Where is my parcel?",
        "where is my parcel",
    )  # fmt: skip


def test_texts_stand_in_the_page_and_not_in_the_pull_request(audited):
    found = report(**audited)
    page = Page("t", "", None, [], [], [leakage(found), near_section(found)])
    assert "vacation days i have &lt;b&gt;" in html(page)
    assert "test.csv:2" in html(page)
    assert "vacation" not in markdown(page)
    assert "| train–test | 1 | 1 |" in markdown(page)


def test_what_an_older_report_or_a_bench_lacks_is_left_out(audited):
    assert leakage(report()) is near_section(report()) is None
    old = report(**{key: value for key, value in audited.items() if key != "near"})
    assert leakage(old).tables[0].rows[1] == ("train–test", "1", "–")
    assert near_section(old) is None
    assert leakage(report(**audited | {"near": None})).figures == []
    assert leakage(report(membership={"student": None})) is None
    assert {leakage, near_section} <= set(SECTIONS)


def test_duplicates_that_were_kept_are_not_said_to_be_dropped():
    _, found = audit(splits(train=["x"], test=["x"]), content, drop=False)
    assert (
        "In 1 case a text stood word for word in two splits; they were left in both"
        in leakage(report(**msgspec.to_builtins(found))).lead
    )


def test_the_worst_classes_are_named_with_their_recall(audited):
    found = [
        ClassScore("late", 30, 0.9, 0.7, 0.7),
        ClassScore("lost", 40, 0.5, 0.45, 0.9),
        ClassScore("ok", 9, 1, 1, 1),
    ]
    evidence = Evidence(classes=found, calibration={}, examples=[])
    section = classes(msgspec.structs.replace(report(), evidence=evidence))
    assert section.lead == (
        "Most recall was lost in late (90.0 % → 70.0 % of 30 rows), lost (50.0 % → 45.0 % of 40 rows); the student's "
        "lowest is that of lost: 45.0 % of 40 rows."
    )
    assert "lowest is that of lost" in markdown(Page("t", "", None, [], [], [section]))
    fine = classes(msgspec.structs.replace(report(), evidence=msgspec.structs.replace(evidence, classes=found[2:])))
    assert fine.lead.startswith("No class lost recall; the student's lowest is that of ok: 100.0 % of 9 rows.")
