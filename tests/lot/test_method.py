"""The variants as they were published, and rendering: one pass, nothing interpreted, empty slots without a trace."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import toolbox.lot
from toolbox.lot.method import (
    ITEM_SLOTS,
    LAYOUT,
    SLOTS,
    Template,
    Values,
    Variant,
    choice_lines,
    closed,
    format_line,
    parse_variants,
)
from toolbox.shell.errors import BadData, UsageProblem

OWN = Path(toolbox.lot.__file__).with_name("variants.yaml").read_bytes()
VARIANTS = parse_variants(OWN, "variants.yaml")
BY_ID = {variant.id: variant for variant in VARIANTS}

STEP = "Let's think step by step."
RAR = "Rephrase and expand the question, and respond."
LTM = (
    "First list the sub-questions that have to be answered, then answer them in order and use them to answer the "
    "question."
)
# What stands behind the question, word for word: arXiv 2505.12896 and its project page; RaR: arXiv 2311.04205.
PUBLISHED = {
    "direct": ("", ""),
    "cot": (STEP, ""),
    "rar": ("", RAR),
    "rar+cot": (STEP, RAR),
    "ltm": ("", LTM),
    "echo": (STEP, "Let's observe and echo all the relevant information."),
    "expand": (STEP, "Let's observe and expand all the relevant information."),
    "lot1": (STEP, "Please expand all the relevant information, and echo them based on the question."),
    "lot2": (STEP, "Please observe, expand, and echo all the relevant information based on the question."),
}
SWITCHED = {"rar+cot", "echo", "expand", "lot1", "lot2"}

LETTER = format_line("letter", ("A", "B", "C"))
FULL = Values("A context.", "A question?", "A) x\nB) y\nC) z", LETTER)
NASTY = [
    "{question}", "{context}", "{clause}", "{format}", "{prefix}", "{choices}", "{", "}", "{{", "}}", "{0}", "{}", "%s",
    "%(question)s", "\\1", "\\g<0>", "$question", "${question}", "\n\n", " ", "{{ question }}", "{% raw %}",
    "\\n", "🙂",
]  # fmt: skip


def by_hand(variant: str, values: Values, *, prefix: str = "cot", bold: bool = False) -> str:
    """The default layout written out with plain strings."""
    step, clause = PUBLISHED[variant]
    if prefix == "none" and variant in SWITCHED:
        step = ""
    if bold and clause:
        clause = "**" + clause + "**"
    question = values.question + ("\n" + values.choices if values.choices else "")
    asked = step + (" " if step and clause else "") + clause
    return "\n\n".join(part for part in (values.context, question, asked, values.format) if part)


def test_the_nine_variants_stand_in_the_order_of_the_tables_and_each_names_its_source():
    assert list(BY_ID) == list(PUBLISHED)
    for variant in VARIANTS:
        origin = "direct" if variant.id == "direct" else {"rar": "2311.04205", "ltm": "own"}.get(variant.id)
        assert (origin if origin and origin != "direct" else "") in variant.source
        assert variant.source
        assert ("2505.12896" in variant.source) == (variant.id not in ("direct", "rar", "ltm"))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_prompt_is_the_published_words_in_the_default_layout(variant):
    for context, choices, (format, labels) in itertools.product(
        ("", "A context."), ("", "A) x\nB) y"), (("letter", "ABC"), ("number", ""), ("text", ""))
    ):
        values = Values(context, "A question?", choices, format_line(format, tuple(labels)))
        for prefix, bold in itertools.product(("cot", "none"), (False, True)):
            template = Template(BY_ID[variant], prefix=prefix, bold=bold)
            assert template(values) == by_hand(variant, values, prefix=prefix, bold=bold)


def test_the_order_of_the_verbs_is_kept():
    assert re.findall("observe|expand|echo", BY_ID["lot2"].clause) == ["observe", "expand", "echo"]
    assert re.findall("observe|expand|echo", BY_ID["lot1"].clause) == ["expand", "echo"]


def test_the_line_that_asks_for_the_answer_is_the_same_in_all_variants():
    assert format_line("letter", ("A", "B", "C")) == 'End with one line: "Answer: X", where X is one of A, B, C.'
    assert format_line("number", ()) == 'End with one line: "Answer: N", where N is a number.'
    assert format_line("text", ()) == 'End with one line: "Answer: ..."'
    assert {Template(variant)(FULL).rpartition("\n\n")[2] for variant in VARIANTS} == {LETTER}


def test_only_prefix_and_clause_differ_between_variants():
    assert {Template(variant)(FULL).partition("\n\nA question?")[0] for variant in VARIANTS} == {"A context."}
    assert len({Template(variant)(FULL) for variant in VARIANTS}) == len(VARIANTS)


def test_choices_stand_one_a_line_and_need_texts():
    assert choice_lines(("A", "B"), ("first", "second one")) == "A) first\nB) second one"
    assert choice_lines(("A", "B"), ()) == ""


@pytest.mark.parametrize("layout", [LAYOUT, "{format}|{question}{question}|{{choices}} {clause} {prefix}\n{context}"])
def test_what_fills_a_slot_is_never_looked_at_again(layout):
    template = Template(BY_ID["lot2"], layout=layout)
    marks = Values(*(f"\x01{name}\x01" for name in ITEM_SLOTS))
    for texts in itertools.chain(itertools.product(NASTY, repeat=2), [("".join(NASTY), "")]):
        values = Values(texts[0], "".join(texts), texts[1] + texts[0], texts[0])
        expected = template(marks)
        # from marks that nothing else can spell, all at once
        expected = re.sub(r"\x01(\w+)\x01", lambda mark, values=values: getattr(values, mark[1]), expected)
        assert template(values) == expected


def test_braces_that_are_no_slot_are_text():
    layout = '{"answer": {}} {0} { question } {{question}} %s \\1'
    assert Template(BY_ID["direct"], layout=layout)(FULL) == '{"answer": {}} {0} { question } {A question?} %s \\1'


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{context}\n\n{question}", "Q?"),
        ("{question}\n\n{context}", "Q?"),
        ("{question}\n\n{context}\n\n{format}", "Q?\n\nF"),
        ("{question}\n{choices}\n{format}", "Q?\nF"),
        ("{context} {question} {choices} {format}", "Q? F"),
        ("{question}\n\n\n{context}{choices}\n\n{format}\n", "Q?\n\n\nF\n"),
        ("Context: {context}\n\nQuestion: {question}", "Context:\n\nQuestion: Q?"),
        ("\n\n{context}\n\n{question}\n\n", "\n\nQ?\n\n"),
        ("{context}{question}{choices}", "Q?"),
        ("{question}\n \t\n{context}\n\n{format}", "Q?\n \t\nF"),
        ("a\n\n{choices}\n{context}\n\nb {question}", "a\n\nb Q?"),
    ],
)
def test_an_empty_slot_takes_its_space_its_line_and_its_blank_line_along(layout, expected):
    assert Template(BY_ID["direct"], layout=layout)(Values("", "Q?", "", "F")) == expected


def test_a_template_serves_items_with_and_without_context_in_any_order():
    template = Template(BY_ID["lot1"])
    bare, full = FULL._replace(context="", choices=""), FULL
    assert [template(values) for values in (full, bare, full)] == [
        by_hand("lot1", values) for values in (full, bare, full)
    ]


def test_a_clause_may_repeat_the_question_but_not_what_is_in_it():
    mine = Variant("mine", "none", "Restate {question}", "me")
    values = FULL._replace(question="Is {context} it?")
    assert "\n\n**Restate Is {context} it?**\n\n" in Template(mine, bold=True)(values)
    asks_for_context = Template(Variant("x", "none", "{context}", "me"), layout="{question} ({clause})")
    assert asks_for_context(FULL._replace(context="")) == "A question? ()"
    assert asks_for_context.slots == {"question", "clause", "context"}


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("{question} {clause} {prefix} {answer}", "unknown slot {answer}"),
        ("{question} {clause} {prefix} {Question}", "unknown slot {Question}"),
        ("{context} {clause} {prefix}", "no {question}"),
        ("{question} {prefix}", "no {clause}, which lot2 needs"),
        ("{question} {clause}", "no {prefix}, which lot2 needs"),
        ("", "no {question}"),
    ],
)
def test_a_layout_that_cannot_say_what_the_variant_says_is_refused(layout, says):
    with pytest.raises(UsageProblem, match=re.escape(says)) as caught:
        Template(BY_ID["lot2"], layout=layout)
    assert caught.value.exit_code == 2
    if "unknown" in says:
        assert all(f"{{{slot}}}" in caught.value.advice for slot in SLOTS)


def test_a_layout_needs_no_slot_for_what_is_not_said():
    assert Template(BY_ID["lot2"], prefix="none", layout="{question} {clause}")(FULL).startswith("A question? Please")
    assert Template(BY_ID["direct"], layout="{question}")(FULL) == "A question?"


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        ("", ""), ("Do it", "Do it."), ("Do it.", "Do it."), ("Do it!", "Do it!"), ("Why?", "Why?"),
        ("as follows:", "as follows:"), ('Say "yes."', 'Say "yes."'), ('Say "yes"', 'Say "yes".'), ("Do it…", "Do it…"),
        ("(Do it.)", "(Do it.)"), ("答えてください。", "答えてください。"), ("v1.0", "v1.0."),
        ("Mind {context}", "Mind {context}"),
    ],
)  # fmt: skip
def test_a_clause_ends_with_a_full_stop_unless_it_is_closed(clause, expected):
    assert closed(clause) == expected


def test_equal_templates_have_equal_shas_and_others_have_others():
    settings = [
        {}, {"prefix": "none"}, {"bold": True}, {"prefix": "none", "bold": True}, {"system": "Be brief."},
        {"layout": LAYOUT + "\n"}, {"layout": LAYOUT + "\n", "system": "Be brief."},
    ]  # fmt: skip
    made = [Template(variant, **more) for variant in VARIANTS for more in settings]
    shas: dict[tuple[str, str], set[str]] = {}
    for template, more in zip(made, settings * len(VARIANTS), strict=True):
        key = (template.system + str(more.get("layout")), template(Values("c", "q", "l", "f")))
        shas.setdefault(key, set()).add(template.sha)
        assert re.fullmatch("[0-9a-f]{16}", template.sha)
    assert all(len(found) == 1 for found in shas.values())
    assert len({next(iter(found)) for found in shas.values()}) == len(shas)
    assert Template(BY_ID["direct"]).sha == Template(BY_ID["direct"], bold=True, prefix="none").sha
    assert Template(BY_ID["rar+cot"], prefix="none").sha == Template(BY_ID["rar"]).sha


def test_a_system_text_is_a_turn_of_its_own():
    template = Template(BY_ID["direct"], system="Be {brief}.")
    assert template.messages("Q") == [
        {"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Q"},
    ]  # fmt: skip
    assert "brief" not in template(FULL)
    assert Template(BY_ID["direct"]).messages("Q") == [{"role": "user", "content": "Q"}]


def test_a_file_of_variants_may_leave_out_clause_and_source_and_fold_lines():
    text = b"- {id: a, prefix: none}\n- id: b\n  prefix: 'cot'\n  clause: >\n    Two\n    lines\n  source: no\n"
    assert parse_variants(text, "mine.yaml") == [
        Variant("a", "none", "", "mine.yaml", 1), Variant("b", "cot", "Two lines", "no", 2),
    ]  # fmt: skip
    assert parse_variants(b"- {id: 007, prefix: none, clause: ~}", "m")[0] == Variant("007", "none", "", "m", 1)
    assert parse_variants(b"- {id: x, prefix: none, clause: '~'}", "m")[0].clause == "~"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "not a list"),
        ("id: a\nprefix: cot\n", None, "not a list"),
        ("--- [{id: a, prefix: cot}]\n--- []\n", None, "not a list"),
        ("- a\n", 1, "not an entry"),
        ("- {id: a, prefix: cot}\n- {id: a, prefix: none}\n", 2, "`a` stands on line 1 already"),
        ("- id: a\n  prefix: cot\n  prefix: none\n", 3, "`prefix` is there twice"),
        ("- id: a\n  prefix: cot\n  clauses: x\n", 3, "unknown key `clauses`"),
        ("- prefix: cot\n", 1, "without `id`"),
        ("- id: a\n", 1, "without `prefix`"),
        ("- {id: a, prefix: null}\n", 1, "without `prefix`"),
        ("- {id: a, prefix: yes}\n", 1, "cot or none, not `yes`"),
        ("- {id: 'a,b', prefix: cot}\n", 1, "cannot be an id"),
        ("- {id: a/b, prefix: cot}\n", 1, "cannot be an id"),
        ("- {id: all, prefix: cot}\n", 1, "cannot be an id"),
        ("- id: a\n  prefix: cot\n  clause: [x]\n", 3, "a value is one text"),
        ("- id: a\n  prefix: cot\n  ? [x]\n  : y\n", 3, "a value is one text"),
        ("- &a {id: a, prefix: cot}\n", 1, "anchors, aliases and tags"),
        ("- id: a\n  prefix: cot\n  clause: !!str x\n", 3, "anchors, aliases and tags"),
        ("- !!python/object/apply:os.system [ls]\n", 1, "anchors, aliases and tags"),
        ('- {id: a, prefix: cot, clause: "\\ud800"}\n', 1, "surrogate"),
        ("- {id: a\n", 2, "not valid YAML"),
        ("- id: a\n\tprefix: cot\n", 2, "not valid YAML"),
        ("[" * 100_000, 1, "a value is one text"),
        ("\x00", None, "not valid YAML"),
    ],
)
def test_a_file_of_variants_is_read_strictly(text, line, says):
    with pytest.raises(BadData) as caught:
        parse_variants(text.encode(), "mine.yaml")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"mine.yaml:{line}: " if line else "mine.yaml:")


def test_an_unknown_slot_in_a_clause_is_a_usage_error_with_its_place():
    for slot in ("answer", "clause", "prefix"):
        with pytest.raises(UsageProblem, match=re.escape(f"m.yaml:2: the clause of b has an unknown slot {{{slot}}}")):
            parse_variants(
                f"- {{id: a, prefix: cot}}\n- {{id: b, prefix: cot, clause: 'x {{{slot}}}'}}\n".encode(), "m.yaml"
            )
