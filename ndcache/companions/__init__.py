"""Companion files: the configuration, the tokenizer and other small files that belong to a model beside its weights."""

from __future__ import annotations

from .companions import Companions

__all__ = ["Companions"]
