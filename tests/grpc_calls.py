"""Infer calls as clients of the protocol write them."""

from __future__ import annotations

from tritonclient.grpc import service_pb2 as pb

TEXTS = ["The striker scored twice in the second half", "Shares fell — the bank warned on profits 📉", ""]


def request(values: list[str], **more: object) -> pb.ModelInferRequest:
    """Texts as contents, not raw."""
    found = pb.ModelInferRequest(model_name="news", **more)
    tensor = found.inputs.add(name="text", datatype="BYTES", shape=[len(values)])
    tensor.contents.bytes_contents.extend(value.encode() for value in values)
    return found
