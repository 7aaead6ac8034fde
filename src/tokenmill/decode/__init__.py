"""Produce tokens left to right, faster or under constraints. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "DecodeTrace": "_request",
        "Tree": "_tree",
        "tree_template": "token_recycling",
        "Potential": "_potential",
        "State": "_potential",
        "ContractError": "_potential",
        "as_potential": "_potential",
        "both": "_potential",
        "check_contract": "_potential",
        "DFA": "_dfa",
        "regex": "_guidance",
        "json_schema": "_guidance",
        "grammar": "_guidance",
        "python_prefix": "_python_prefix",
        "predicate": "_predicate",
    },
)
