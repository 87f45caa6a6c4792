"""One client for OpenAI-compatible servers: concurrency, retry, deadline, budget, cache; shared by everyone who asks."""

from lensmini.endpoint.client import Endpoint
from lensmini.endpoint.json_text import parse_json
from lensmini.endpoint.messages import FAILURE_CAUSES, ChatRequest, Failure, Message, Reply, Unauthorised, image_message
from lensmini.endpoint.spending import Spent

__all__ = [
    "FAILURE_CAUSES",
    "ChatRequest",
    "Endpoint",
    "Failure",
    "Message",
    "Reply",
    "Spent",
    "Unauthorised",
    "image_message",
    "parse_json",
]
