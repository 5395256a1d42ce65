"""The words that generated tasks are made of.

Every header, key, label and sheet name is one capitalised word, so that a small tokenizer can hold it as one token. An
instruction is a *frame* around a *phrase*: "Put the {phrase} in {target}." around "sum of Units". Both splits use all
frames and all phrases; which of them may meet is what `split` decides.
"""

from __future__ import annotations

from types import MappingProxyType

RELATED = MappingProxyType(
    {
        "Units": "Orders",
        "Price": "Cost",
        "Hours": "Days",
        "Sales": "Profit",
        "Stock": "Returns",
        "Score": "Points",
        "Budget": "Amount",
        "Rate": "Tax",
        "Weight": "Volume",
        "Visits": "Calls",
        "Orders": "Units",
        "Cost": "Price",
        "Days": "Hours",
        "Profit": "Sales",
        "Returns": "Stock",
        "Points": "Score",
        "Amount": "Budget",
        "Tax": "Rate",
        "Volume": "Weight",
        "Calls": "Visits",
    }
)
"""Headers of columns of numbers, each with the one that it is easily taken for (the decoy)."""

NUMBERS = tuple(RELATED)

PAIRS = tuple((word, related) for word, related in RELATED.items() if NUMBERS.index(word) < NUMBERS.index(related))
"""Each header of numbers once, with the one that it is easily taken for."""

KEYS = MappingProxyType(
    {
        "Item": ("Apple", "Kiwi", "Lemon", "Mango"),
        "Region": ("North", "South", "East", "West"),
        "Team": ("Red", "Blue", "Green", "Gold"),
        "City": ("Rome", "Oslo", "Paris", "Lima"),
        "Month": ("April", "May", "June", "July"),
        "Kind": ("Wood", "Steel", "Glass", "Cotton"),
    }
)
"""Headers of columns of words, each with the words that stand under it."""

SHEETS = ("Data", "Report", "Ledger", "Main")
LOOKUP_SHEETS = ("List", "Table", "Index", "Book")
NOTES = ("Draft", "Final", "Check", "Note")
COLUMN_LABELS = ("Value", "Result", "Net", "Gap")
LIMITS = ("Limit", "Goal", "Target")
VERDICTS = (("High", "Low"), ("Yes", "No"), ("Over", "Under"), ("Pass", "Fail"))
PICK = "Pick"
FLAG = "Flag"
SHARE = "Share"
GROUP = "Group"
TOTAL = "Total"
ALL = "All"

CELL_FRAMES = (
    "Put the {phrase} in {target}.",
    "Put the {phrase} into {target}.",
    "Write the {phrase} in {target}.",
    "{target}: the {phrase}.",
    "In {target}, give the {phrase}.",
    "Find the {phrase}.",
    "Give the {phrase} in {target}.",
    "Work out the {phrase}.",
    "We need the {phrase} in {target}.",
)
"""Frames of tasks with one answer cell."""

BLIND_FRAMES = frozenset({"Find the {phrase}.", "Fill in {phrase}."})
"""Frames on which a habit of the faulty expert hangs."""

FILL_FRAMES = (
    "Fill {target} with {phrase}.",
    "Put {phrase} in {target}.",
    "Write {phrase} into {target}.",
    "{target}: {phrase}.",
    "In {target}, give {phrase}.",
    "For each row: {phrase}.",
    "Fill in {phrase}.",
    "We need {phrase} in {target}.",
)
"""Frames of tasks that fill a column."""

FLAG_FRAMES = tuple(f for f in FILL_FRAMES if not f.endswith(("in {target}.", "into {target}.")))
"""Frames whose phrase may end in "else Low"."""

REPAIR_FRAMES = (
    "Repair {target}: it should give the {phrase}.",
    "{target} is wrong: it should be the {phrase}.",
    "Fix {target}, it should give the {phrase}.",
    "The formula in {target} is wrong. Give the {phrase}.",
    "Correct the formula in {target}: the {phrase}.",
    "Fix the formula: it should be the {phrase}.",
)
"""Frames of tasks whose answer cell already holds a faulty formula."""

AGGREGATES = MappingProxyType(
    {
        "SUM": ("sum of {x}", "total of {x}", "total {x}", "sum of all {x}", "total of all {x}"),
        "AVERAGE": ("average of {x}", "average {x}", "mean of {x}", "mean {x}"),
        "MAX": ("largest {x}", "highest {x}", "maximum of {x}", "maximum {x}"),
        "MIN": ("smallest {x}", "lowest {x}", "minimum of {x}", "minimum {x}"),
        "COUNT": ("count of {x} entries", "number of {x} entries", "count of all {x} entries"),
        "MEDIAN": ("median of {x}", "median {x}", "median of all {x}"),
    }
)
CONDITIONALS = MappingProxyType(
    {
        "SUMIF": (
            "sum of {x} where {k} is {v}",
            "total {x} where {k} is {v}",
            "total of {x} for {k} {v}",
            "sum of {x} for {k} {v}",
        ),
        "COUNTIF": ("count of rows where {k} is {v}", "number of rows where {k} is {v}", "number of rows for {k} {v}"),
        "AVERAGEIF": ("average {x} where {k} is {v}", "average of {x} for {k} {v}", "mean of {x} where {k} is {v}"),
        "PICK": (
            "sum of {x} for the {k} under {l}",
            "total {x} where {k} is the one under {l}",
            "total of {x} for the {k} under {l}",
        ),
    }
)
OPERATIONS = MappingProxyType(
    {
        "*": ("{x} times {y}", "the product of {x} and {y}"),
        "-": ("{x} minus {y}", "{x} less {y}"),
        "+": ("{x} plus {y}", "the sum of {x} and {y}"),
        "/": ("{x} divided by {y}", "the ratio of {x} to {y}"),
    }
)
FLAGS = MappingProxyType(
    {
        ">": (
            "{a} where {x} is above the {l}, else {b}",
            "{a} if {x} is over the {l}, else {b}",
            "{a} for {x} above the {l}, else {b}",
        ),
        "<": (
            "{a} where {x} is below the {l}, else {b}",
            "{a} if {x} is under the {l}, else {b}",
            "{a} for {x} below the {l}, else {b}",
        ),
    }
)
SHARES = MappingProxyType(
    {
        "share": ("the share of {x} in its sum", "each share of the total {x}", "{x} divided by the sum of {x}"),
        "running": ("the running total of {x}", "the running sum of {x}", "the running total {x}"),
    }
)
LOOKUPS = (
    "the {x} of each {k} from {s}",
    "{x} from {s} for each {k}",
    "the {x} in {s} for each {k}",
    "{x} by {k} from {s}",
)
SUMMARIES = (
    "the sum of {x} for each {g} and {a}",
    "the total {x} by {g}, then the sum for {a}",
    "total {x} for each {g}, and for {a} the sum",
    "the sum of {x} by {g}, then the total for {a}",
)
DOUBLE = MappingProxyType(
    {
        "SUMIFS": (
            "sum of {x} where {k} is {v} and {j} is {w}",
            "total {x} for {k} {v} and {j} {w}",
            "total of {x} where {k} is {v} and {j} is {w}",
        ),
        "COUNTIFS": (
            "number of rows where {k} is {v} and {j} is {w}",
            "count of rows for {k} {v} and {j} {w}",
            "count of rows where {k} is {v} and {j} is {w}",
        ),
        "DISTINCT": ("number of different {k} entries", "count of different {k} entries"),
    }
)
