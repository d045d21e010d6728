"""Reports as documents, and documents as plain text and as Markdown."""

from fxopt.render.markdown import fenced, to_markdown
from fxopt.render.memory import memory_document
from fxopt.render.report import report_document
from fxopt.render.text import to_text
from fxopt.render.transform import transform_document

__all__ = [
    "fenced",
    "memory_document",
    "report_document",
    "to_markdown",
    "to_text",
    "transform_document",
]
