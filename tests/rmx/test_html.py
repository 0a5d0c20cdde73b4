"""The page of a run: whole, self-contained, safe against what a model can write, and true to its records."""

import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from rmx.config import Config
from rmx.cost import StageCost
from rmx.records import Accuracy, Evaluation, Interval, Problem, Rollout, Scores, TrainingSequence, Verdict
from rmx.reports import charts, html, report
from rmx.training.train import StepMetrics

VOID = {"meta", "link", "br", "hr", "img", "input"}
TEXTS = ("It is 7 – 3 = 4.\n\tDone", "Na ja, vielleicht 🙂 5", "<script>alert(1)</script> \"'&\x00\u202e", "so 4")


def decode(ids: list[int]) -> str:
    """A tokenizer of bytes: most characters that are not English are split over tokens."""
    return bytes(ids).decode("utf-8", errors="replace")


class Reader(HTMLParser):
    """Elements as (tag, attributes), text, and whether each tag is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def tokens(self) -> list[dict[str, str]]:
        return [a for tag, a in self.elements if tag == "span" and "title" in a]


def accuracy(mean: float) -> Accuracy:
    one = Interval(mean, mean - 0.1, mean + 0.1)
    return Accuracy(30, 2, one, 0.05, {1: one, 2: one}, {1: one, 2: one}, 9.0, 0.1, 0.5, 0)


def records(texts: tuple[str, ...] = TEXTS) -> tuple[list[Problem], list[Rollout], list[Verdict], list[Scores]]:
    """Two problems with two rollouts each, the right one second; entropy 0, 1, 2, 0, 1, 2, ... nats."""
    problems = [Problem(f"p{i}", f"What is <b>{i}</b>?", "4") for i in range(len(texts) // 2)]
    rollouts, verdicts, scores = [], [], []
    for n, text in enumerate(texts):
        problem_id, sample, ids = f"p{n // 2}", n % 2, list(text.encode())
        rollouts.append(Rollout(problem_id, sample, list(b"Q & A: "), ids, "stop", text))
        verdicts.append(Verdict(problem_id, sample, "right" if sample else "wrong", "<i>4</i>"))
        T = len(ids)
        best = torch.tensor([[65, 66, 67, 68]] * T, dtype=torch.int32)
        columns = (torch.arange(T) % 3).float(), torch.full((T,), -0.5), torch.zeros(T)
        scores.append(Scores(problem_id, sample, *columns, best, torch.tensor([[0.5, 0.25, 0.15, 0.1]] * T).log()))
    return problems, rollouts, verdicts, scores


def training_set(rollouts: list[Rollout], scores: list[Scores], tau: float) -> list[TrainingSequence]:
    return [
        TrainingSequence(
            problem_id=r.problem_id,
            sample=r.sample,
            prompt_ids=r.prompt_ids,
            completion_ids=r.completion_ids,
            reward=float(r.sample),
            advantage=2.0 * r.sample - 1,
            decision_tokens=[int(t) for t in torch.nonzero(s.entropy > tau).flatten()],
            base_logprob=s.logprob.tolist(),
        )
        for r, s in zip(rollouts, scores, strict=True)
    ]


@pytest.fixture
def page() -> html.Page:
    problems, rollouts, verdicts, scores = records()
    trained = training_set(rollouts, scores, tau=1.4)
    base, tuned = accuracy(0.3), accuracy(0.5)
    history = [StepMetrics(i, 1.0, 1.0, 0.1, None if i == 3 else 0.1, -0.1, 1.0, 1e-4, 9, 0.1) for i in range(1, 8)]
    return html.Page(
        config=Config.model_validate(
            {
                "run_dir": "runs/<x>",
                "model": {"name": "M&M"},
                "prompt": {"style": "auto"},
                "problems": {"sources": [{"task": "gcd"}]},
            }
        ),
        evaluation=Evaluation(30, 2, base, tuned, Interval(0.2, 0.1, 0.3), {"reasoning_gym:gcd": (0.3, 0.5)}),
        entropies=torch.cat([s.entropy for s in scores]).numpy(),
        tau=1.4,
        training_set=trained,
        history=history,
        examples=html.pick_examples(problems, rollouts, verdicts, scores, trained),
        style="qwen_boxed",
        prompt="48a7a5116b784943",
        costs=[StageCost("verify", 1.5, None, None, None, None), StageCost("train", 300.0, 9000, None, 1.25, 0.5)],
        dates=(datetime(2026, 1, 2, 3, 4), datetime(2026, 1, 2, 5, 6)),
        notes={"Machine": "<two> cores"},
    )


def written(page: html.Page, path: Path) -> str:
    html.write_html(path / "report.html", page, decode)
    return (path / "report.html").read_text(encoding="utf-8")


def test_every_section_is_there_and_nothing_comes_from_elsewhere(page: html.Page, tmp_path: Path) -> None:
    text = written(page, tmp_path)
    read = Reader(text)
    assert {a["id"] for tag, a in read.elements if tag == "section"} == {
        "accuracy",
        "gate",
        "rollouts",
        "training",
        "cost",
    }
    assert {a["href"] for _, a in read.elements if "href" in a} == {
        "data:,",
        "#accuracy",
        "#gate",
        "#rollouts",
        "#training",
        "#cost",
    }
    assert not any("src" in a for _, a in read.elements)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    policy = next(a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_page_says_what_was_run_and_what_came_out(page: html.Page, tmp_path: Path) -> None:
    said = "".join(Reader(written(page, tmp_path)).text.split())
    for words in (
        "The tuned model is better: 0.200 [0.100, 0.300]",
        "Model M&M",
        "style qwen_boxed (auto), fingerprint 48a7a5116b784943",
        "tau = 1.4 nats, fixed",
        "LoRA r = 32, alpha = 64 on q_proj, k_proj, v_proj, o_proj",
        "learning rate 0.0001, 7 steps of 8 rollouts",
        "2026-01-02 03:04 to 05:06",
        "Machine <two> cores",
        "anchor_weight: 0.2",
        "pass@2 0.300 [0.200, 0.400] 0.500 [0.400, 0.600] +0.200",
        "maj@2 0.300",
        "gcd 0.300 0.500 +0.200",
        "boxed answer 50.0 % 50.0 %",
        "train 5.0 min 9,000 – 1.25 0.5000",
        "in all 5.0 min 9,000 0 1.25 0.5000",
    ):
        assert "".join(words.split()) in said, words


def test_the_page_and_the_picture_have_the_same_colours(page: html.Page, tmp_path: Path) -> None:
    style = written(page, tmp_path).partition("</style>")[0]
    for name, colour in report.COLOURS.items():
        assert f"--{name}: {colour};" in style.partition("@media")[0], name


def test_text_of_the_model_stays_text(page: html.Page, tmp_path: Path) -> None:
    text = written(page, tmp_path)
    read = Reader(text)
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "two", "x"}
    assert "<b>0</b>" not in text and "What is <b>0</b>?" in read.text
    assert "answer <i>4</i>" in read.text
    shown = "".join(re.findall(r'<span class="t[^>]*>([^<]*)</span>', text))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#34;&#39;&amp;␀" in shown
    assert "\x00" not in text


def test_the_gate_on_the_page_is_the_gate_of_the_training_set(page: html.Page, tmp_path: Path) -> None:
    tokens = Reader(written(page, tmp_path)).tokens()
    assert len(page.examples) == 4
    expected = sum(len(e.sequence.decision_tokens) for e in page.examples)
    assert sum(a["title"].count("decision token") for a in tokens) == expected
    for a in tokens:
        assert ("decision token" in a["title"]) == (a["class"].split() == ["t", "d"])
        assert "top 3: “A” 50.0\u00a0%  “B” 25.0\u00a0%  “C” 15.0\u00a0%" in a["title"]
        assert "log-prob -0.50 (60.7\u00a0%)" in a["title"]
    assert sum(a["title"].count("entropy ") for a in tokens) == sum(len(e.scores.entropy) for e in page.examples)


def test_examples_follow_the_rule() -> None:
    problems, rollouts, verdicts, scores = records(TEXTS * 3)
    trained = training_set(rollouts, scores, 1.4)[::-1]  # the last problem comes first
    extra = replace(trained[0], sample=7)
    found = html.pick_examples(problems, rollouts, verdicts, scores, [*trained, extra])
    assert [(e.problem.problem_id, e.verdict.outcome) for e in found] == [
        (p, outcome) for p in ("p5", "p4", "p3") for outcome in ("right", "wrong")
    ]
    assert all(e.rollout.completion_ids == e.sequence.completion_ids for e in found)


def test_characters_stay_whole() -> None:
    text = "a–🙂é\n"
    found = html.split_tokens(decode, list(b"x"), list(text.encode()))
    assert [piece for _, piece in found] == list(text)
    assert [len(own) for own, _ in found] == [1, 3, 4, 2, 1]
    broken = [*b"a", 0xFF, *b"b", 0xF0, 0x9F]  # bytes that are no character, and one that the length limit cut
    found = html.split_tokens(decode, [], broken)
    assert [i for own, _ in found for i in own] == list(range(len(broken)))
    assert "".join(piece for _, piece in found).startswith("a\ufffdb\ufffd")
    assert len(html.split_tokens(decode, [], [0xFF] * 9)) == 3


def test_leading_spaces_that_a_tokenizer_drops_alone_are_kept() -> None:
    words = ["one", "two", "three"]
    found = html.split_tokens(lambda ids: " ".join(words[i] for i in ids), [0], [1, 2, 0])
    assert [piece for _, piece in found] == [" two", " three", " one"]


@pytest.mark.parametrize("tau", [-1.0, 0.0, 0.001, 0.7, 1.3, 9.0])
def test_no_bar_is_half_gated(tau: float) -> None:
    entropy = np.concatenate([np.zeros(3), np.random.default_rng(0).gamma(1.0, size=500), [0.7]]).astype(np.float32)
    chart = charts.histogram(entropy, tau)
    assert chart is not None and chart.mark is not None
    for (name, path), (low, high) in zip(chart.areas, ((0, chart.mark[0]), (chart.mark[0], 100)), strict=True):
        for left, up, right in re.findall(r"M([\d.]+) 1000V([\d.]+)H([\d.]+)V1000Z", path):
            assert 10 * low - 0.1 <= float(left) <= float(right) <= 10 * high + 0.1, name
            assert 0 <= float(up) <= 1000
    assert all(0 <= at <= 100.01 for at, _ in [*chart.x_ticks, *chart.y_ticks])


def test_curves_have_gaps_and_stay_in_their_box(page: html.Page) -> None:
    long = [replace(page.history[0], step=i + 1, loss=float(np.sin(i))) for i in range(3000)]
    for history in (page.history, page.history[:1], long):
        for chart in charts.curves(history):
            for _, path in chart.lines:
                points = [float(v) for pair in re.findall(r"(\d+) (-?\d+)", path) for v in pair]
                assert points and all(0 <= v <= 1000 for v in points)
                assert len(points) <= 2 * charts.POINTS
    change = charts.curves(page.history)[1]
    assert dict(change.lines)["right faint"].count("M") == 2  # one step has no right rollout
    assert dict(change.lines)["wrong faint"].count("M") == 1


def test_what_is_missing_is_said(page: html.Page, tmp_path: Path) -> None:
    bare = replace(accuracy(0.0), standard_error=None, pass_at_k={}, maj_at_k={}, pass_at_1=Interval(0, 0, 0))
    nothing = replace(
        page,
        evaluation=Evaluation(1, 1, bare, replace(bare, unverified=2), Interval(0, 0, 0), {"": (0.0, 0.0)}),
        entropies=np.zeros(0, dtype=np.float32),
        training_set=[],
        history=[],
        examples=[],
        costs=[],
        dates=None,
        notes={},
    )
    said = Reader(written(nothing, tmp_path)).text
    for words in ("too few", "No scored tokens", "No rollouts", "No steps", "No costs", "not verified", "no category"):
        assert words in said, words
    shiftless = [replace(m, positive_shift=None, negative_shift=None, anchor_kl=0.0) for m in page.history]
    Reader(written(replace(page, history=shiftless), tmp_path))


def test_an_unscored_alternative_and_a_broken_text_do_not_stop_it(page: html.Page, tmp_path: Path) -> None:
    e = page.examples[0]
    scores = replace(e.scores, topk_ids=e.scores.topk_ids[:, :0], topk_logprobs=e.scores.topk_logprobs[:, :0])
    odd = replace(e, scores=scores, problem=replace(e.problem, question="half \ud83d"))
    read = Reader(written(replace(page, examples=[odd]), tmp_path))
    assert "half ?" in read.text
    assert not any("top" in a["title"] for a in read.tokens())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantile": 0.8}, "the 0.8 quantile"),
        ({"budget": 0.03}, "for a budget of 3.0\u00a0%"),
        ({"tau": 1.4, "gate": "random"}, "control: as many tokens at random"),
        ({"tau": 1.4, "shuffle_advantages": True}, "control: advantages shuffled"),
    ],
)
def test_the_page_tells_where_tau_came_from(
    page: html.Page, tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    config = page.config.model_dump()
    changed = replace(page, config=Config.model_validate({**config, "select": settings}))
    text = Reader(written(changed, tmp_path)).text
    assert words in text
    assert ("select.gate: random" in text) == ("gate" in settings)


def test_long_completions_are_cut_and_the_page_stays_small(page: html.Page, tmp_path: Path) -> None:
    problems, rollouts, verdicts, scores = records(("word " * 1000,) * 6)
    trained = training_set(rollouts, scores, 1.4)
    examples = html.pick_examples(problems, rollouts, verdicts, scores, trained)
    text = written(replace(page, examples=examples, history=page.history * 500), tmp_path)
    assert len(examples) == 6 and len(text.encode()) < 1_000_000
    read = Reader(text)
    assert len(read.tokens()) == 6 * html.SHOWN
    assert "The first 500 of 5,000 tokens" in read.text
