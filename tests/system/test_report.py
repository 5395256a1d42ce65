from html.parser import HTMLParser

import pytest
from espalier.trainer.cli import main
from espalier.trainer.errors import UserError
from espalier.trainer.report import choose_examples, write_report

EVIL = "<script>alert(1)</script>\"'><img src=http://x.invalid/y onerror=alert(2)>\x1b[2J"


class Reader(HTMLParser):
    """Collects what a browser would obey, and the text a person reads."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page.read_text())
    return reader, " ".join("".join(reader.text).split())


def test_the_page_says_what_a_newcomer_asks(make_run, episodes, task):
    page = write_report(make_run(trajectories=episodes))
    reader, text = read(page)
    assert "Before training, the agent solved 34.0% of 400 tasks it had never seen." in text
    assert "After 2 steps of training it solved 83.0%." in text
    assert "[29.0%, 39.0%]" in text and "+49.0 points" in text and "+40.0 points" in text
    assert "failed episodes: ungraded" in text and "failed episodes: env" in text
    assert reader.tags.count("svg") >= 2
    assert "not solved (reward 0)" in text and ": solved (reward 1)" in text
    assert " ".join(task.instruction.split()) in text and "fill_formula" in text and "666 =600+66" in text


def test_the_page_needs_no_network_and_runs_nothing(make_run, episodes):
    page = write_report(make_run(trajectories=episodes))
    reader, _ = read(page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "base"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href", "action")]
    assert "http://www.w3.org/2000/svg" in page.read_text()  # the one address is a name, never fetched
    assert page.read_text().count("http") == page.read_text().count("http://www.w3.org/2000/svg") + 1  # http-equiv


def test_nothing_that_comes_from_outside_is_obeyed(make_run, episodes, eval_row, train_row):
    from dataclasses import replace

    early, late = episodes
    poisoned = [
        replace(
            one,
            instruction=EVIL,
            turns=tuple(
                replace(turn, results=(EVIL,), calls=({"id": "", "name": EVIL, "arguments": {EVIL: EVIL}},))
                for turn in one.turns
            ),
        )
        for one in (early, late)
    ]
    rows = [
        eval_row(0, 0, "sampled", 0.3, by_family={EVIL: {"n": 3, "pass1": 0.2}}),
        train_row(1, failures={EVIL: 2}),
        {"kind": "alarm", "step": 1, "message": EVIL},
        eval_row(1, 1, "sampled", 0.5, by_family={EVIL: {"n": 3, "pass1": 0.4}}, failures={EVIL: 1}),
    ]
    page = write_report(make_run(rows, poisoned, overrides=["--env.system_prompt", EVIL]))
    reader, text = read(page)
    assert not {"script", "img"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in text and "\x1b" not in page.read_text()


def test_the_reader_would_have_noticed():
    reader = Reader()
    reader.feed(EVIL)
    assert {"script", "img"} <= set(reader.tags) and any(name == "onerror" for name, _ in reader.attributes)


def test_an_unfinished_run_says_so(make_run, rows):
    _, text = read(write_report(make_run(rows[:4])))
    assert "It has not been measured again yet." in text


def test_the_page_is_replaced_whole(make_run, rows):
    folder = make_run()
    page = write_report(folder)
    before = page.read_text()
    (folder / "config.json").write_text("broken")
    with pytest.raises(UserError):
        write_report(folder)
    assert page.read_text() == before and sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "report.html",
    ]


def test_a_run_with_nothing_in_it_is_refused(make_run):
    with pytest.raises(UserError, match="nothing to report"):
        write_report(make_run(rows=[]))


def test_examples_are_an_early_failure_and_a_later_success(episodes):
    early, late = episodes
    assert choose_examples([early], [late]) == [(early, late)]
    assert choose_examples([late], [early]) == []
    assert choose_examples([early], [early]) == []


def test_the_command_prints_where_the_page_is(make_run, capfd):
    folder = make_run()
    assert main(["report", str(folder)]) == 0
    assert capfd.readouterr().out.strip() == str(folder / "report.html")


def test_what_branching_saved_is_said(make_run, rows, train_row):
    grown = {"trees": 100, "branches": 1156, "tokens_saved": 4321, "turns_saved": 1200}
    _, text = read(write_report(make_run(rows=[*rows, train_row(3, branching=grown)])))
    assert "100 began at the start and 1,156 left one of those at a turn" in text
    assert "saved 4,321 sampled tokens and 1,200 turns" in text
    _, chains = read(write_report(make_run(rows=rows, name="chains")))
    assert "began at the start" not in chains
