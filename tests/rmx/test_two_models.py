"""`rmx evaluate` by a server that has the base and the tuned model under two names."""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stub_server import Handler, Stub, by_ids
from test_pipeline import changed

from rmx.analyses.ablate import ablate
from rmx.analyses.benchmarks import run_benchmarks
from rmx.config import Config, EvaluateConfig
from rmx.errors import AnalysisError
from rmx.models.model import CausalLM
from rmx.runs.pipeline import Run
from rmx.sampling import remote
from rmx.sampling.engines import EngineError
from rmx.sampling.remote import check_served

BASE, TUNED = "base-7b", "tuned"
Listed = Callable[[list[str] | None], Stub]


def by_name(path: str, body: dict[str, Any]) -> Any:
    """As vLLM with --lora-modules: an unknown model is a 404; the tuned one always says the word of id 9."""
    if body["model"] not in (BASE, TUNED):
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
    answer = by_ids(path, body)
    if body["model"] == TUNED and isinstance(answer, dict):
        for choice in answer["choices"]:
            choice["token_ids"] = [9, 2]
            choice["finish_reason"] = "stop"
    return answer


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listed]:
    """A server that lists the models of these names; None: it lists none."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(remote, "RETRIES_S", (0.01,))
    servers: list[Stub] = []

    def start(names: list[str] | None) -> Stub:
        class WithModels(Handler):
            def do_GET(self) -> None:
                known = self.path == "/v1/models" and names is not None
                content = json.dumps({"object": "list", "data": [{"id": name} for name in names or []]}).encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        server = Stub(by_name)
        server.RequestHandlerClass = WithModels
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def served(config: Config, url: str, **more: Any) -> Run:
    names = {"server_model": BASE, "tuned_model": TUNED, **more}
    return Run(changed(config, evaluate={"engine": "openai", "base_url": url, **names}))


def test_base_and_tuned_are_asked_by_their_names(finished: Run, listing: Listed) -> None:
    server = listing([BASE, TUNED])
    run = served(finished.config, server.url)
    run.execute("evaluate", again=True)
    assert {body["model"] for body in server.bodies} == {BASE, TUNED}
    (base, _), (tuned, _) = run.evaluated("base"), run.evaluated("tuned")
    assert {tuple(r.completion_ids) for r in tuned} == {(9, 2)}
    assert len({tuple(r.completion_ids) for r in base}) > 2
    assert [r.prompt_ids for r in base] == [r.prompt_ids for r in tuned]
    seeds = {name: sorted(b["seed"] for b in server.bodies if b["model"] == name) for name in (BASE, TUNED)}
    assert seeds[BASE] == seeds[TUNED]  # common random numbers
    # the word of id 9 is the digit 4
    right = [p for p in run.problems("evaluate") if p.answer == "4"]
    assert run.evaluation().tuned.pass_at_1.mean == pytest.approx(len(right) / 20)
    before = len(server.bodies)
    assert Run(run.config).run() == run.evaluation()
    assert len(server.bodies) == before


def test_a_name_that_is_not_served_is_an_error_that_lists_those_that_are(finished: Run, listing: Listed) -> None:
    server = listing([BASE, "other"])
    with pytest.raises(
        EngineError, match=r"/v1: no model 'tuned' there, only 'base-7b', 'other': set .*tuned_model"
    ) as e:
        served(finished.config, server.url).execute("evaluate", again=True)
    assert f"--lora-modules tuned={finished.path('adapter')}" in str(e.value)
    with pytest.raises(EngineError, match=r"no model 'base-8b' there, only 'base-7b', 'other': set server_model") as e:
        served(finished.config, server.url, server_model="base-8b").execute("evaluate", again=True)
    assert "--lora-modules" not in str(e.value)
    assert server.bodies == []  # before anything is sampled


def test_the_rollouts_name_the_server_s_models_too(tiny_config: Config, listing: Listed) -> None:
    server = listing([BASE, TUNED])
    run = Run(
        changed(tiny_config, rollouts={"engine": "openai", "base_url": server.url, "server_model": "no/such-model"})
    )
    run.execute("problems")
    with pytest.raises(EngineError, match=r"/v1: no model 'no/such-model' there, only 'base-7b', 'tuned'"):
        run.execute("rollouts")
    silent = listing(None)  # what it says is all there is
    run = Run(changed(run.config, rollouts={"base_url": silent.url}))
    with pytest.raises(EngineError, match=r"no form of request: .*status 404: The model `no/such-model` does not"):
        run.execute("rollouts")


def test_a_server_that_lists_nothing_may_have_one_model(tiny: CausalLM, listing: Listed, tmp_path: Any) -> None:
    sampling = EvaluateConfig(engine="openai", base_url=listing(None).url, server_model=BASE, tuned_model=TUNED)
    with pytest.raises(EngineError, match=r"does not list its models \(GET /models\)"):
        check_served(tiny, sampling, tmp_path)
    many = listing([f"m{i}" for i in range(50)])
    with pytest.raises(EngineError, match=r"'m19' and 30 more: set"):
        check_served(tiny, sampling.model_copy(update={"base_url": many.url}), tmp_path)


def test_benchmarks_ask_both_models_and_ablations_are_refused(finished: Run, listing: Listed, tmp_path: Any) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('{"question": "sum of 1 and 2", "answer": "4"}\n')
    server = listing([BASE, TUNED])
    run = served(finished.config, server.url)
    run.execute("evaluate", again=True)
    (result,) = run_benchmarks(run, [str(file)], tuned=True, samples=2)
    assert result.tuned is not None and result.tuned.pass_at_1.mean == 1.0
    assert dataclasses.asdict(result.base) != dataclasses.asdict(result.tuned)
    with pytest.raises(AnalysisError, match="a server has one tuned model, not every variant"):
        ablate(run, tmp_path / "ablate")


@pytest.mark.parametrize(
    ("evaluate", "train", "message"),
    [
        ({"tuned_model": None}, {}, "expected tuned_model .the adapter's name on the server"),
        ({"engine": "loop", "base_url": None}, {}, "tuned_model .*with another engine"),
        ({"server_model": TUNED}, {}, "expected two names, got the same one"),
        ({}, {"candidates": 2}, "a server has one tuned model: use another evaluate.engine"),
    ],
)
def test_settings_that_do_not_go_together(
    tiny_config: Config, evaluate: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    given = {"engine": "openai", "base_url": "http://localhost:1/v1", "server_model": BASE, "tuned_model": TUNED}
    with pytest.raises(ValueError, match=message):
        changed(tiny_config, evaluate={**given, **evaluate}, train=train, problems={"choose_count": 5})
