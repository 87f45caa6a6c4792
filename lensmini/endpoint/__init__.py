"""One client for every server that speaks the OpenAI chat protocol, hosted or local: captions, judges, reasoner."""

from lensmini.endpoint.answers import parse_json
from lensmini.endpoint.cache import ReplyCache
from lensmini.endpoint.client import Endpoint
from lensmini.endpoint.messages import FAILURE_CAUSES, ChatRequest, Failure, Reply, image_message
from lensmini.endpoint.spending import Spent

__all__ = [
    "FAILURE_CAUSES",
    "ChatRequest",
    "Endpoint",
    "Failure",
    "Reply",
    "ReplyCache",
    "Spent",
    "image_message",
    "parse_json",
]
