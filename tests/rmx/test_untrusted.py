"""What strangers write stays data: chat templates, pages, adapters' files, and the key of a server."""

import ast
import json
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from test_html import Reader, written
from test_html import page as _page
from test_remote_bounds import KEY, reply
from test_remote_bounds import serve as _serve

import rmx
from rmx.config import Config, LoraConfig, PromptConfig
from rmx.errors import RmxError
from rmx.models import lora, model
from rmx.models.lora import AdapterError
from rmx.models.prompts import PromptError, Renderer
from rmx.reports import html
from rmx.runs.pipeline import Run
from rmx.sampling import remote

page, serve = _page, _serve  # fixtures


# ---- chat templates ------------------------------------------------------------------------------------------------

HOSTILE_TEMPLATES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute by filter": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "function's globals": "{{ raise_exception.__globals__ }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "change of a list": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_template_of_a_model_leaves_the_sandbox_nowhere(tiny: model.CausalLM, name: str) -> None:
    tiny.tokenizer.chat_template = HOSTILE_TEMPLATES[name]
    try:
        text = Renderer(tiny.tokenizer, PromptConfig(style="chat")).text("sum of 3")
    except (PromptError, TypeError, OverflowError) as fault:
        text = str(fault)
    for inner in ("<class ", "__globals__'", "root:", "object at 0x"):
        assert inner not in text
    assert len(text) < 2000


def test_no_template_of_a_model_is_rendered_by_ourselves() -> None:
    """jinja2 is called in the two modules of reports, on templates of this package; models' go to transformers."""
    callers = {}
    for path in Path(rmx.__file__).parent.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        names = {getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls}
        if found := names & {"Environment", "Template", "from_string", "SandboxedEnvironment", "NativeEnvironment"}:
            callers[path.name] = found
    assert callers == {"pages.py": {"Environment"}, "card.py": {"Environment", "from_string"}}


# ---- pages ---------------------------------------------------------------------------------------------------------

NASTY = "\"><script src=//x>alert(1)</script><img src=x onerror=alert(1)>'<a href=javascript:alert(1)>{{ 7*7 }}"


def test_every_text_of_the_page_is_text(page: html.Page, tmp_path: Path) -> None:
    plain = Reader(written(page, tmp_path))
    tree = page.config.model_dump()
    tree["model"]["name"] = tree["prompt"]["suffix"] = tree["prompt"]["system"] = NASTY
    tree["lora"]["targets"], tree["cost"]["currency"] = [NASTY], NASTY
    examples = [
        replace(
            e,
            problem=replace(e.problem, problem_id=NASTY, question=NASTY, answer=NASTY, category=NASTY),
            verdict=replace(e.verdict, answer=NASTY, reason=NASTY),
        )
        for e in page.examples
    ]
    result = replace(page.evaluation, categories={NASTY: (0.3, 0.5)})
    hostile = replace(
        page,
        config=Config.model_validate(tree),
        examples=examples,
        evaluation=result,
        style=NASTY,
        prompt=NASTY,
        notes={NASTY: NASTY},
    )
    found = Reader(written(hostile, tmp_path))
    assert found.text.count("<script src=//x>") >= 8 and "{{ 7*7 }}" in found.text
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements} | {"tr", "td", "th"}
    scripts = [tag for tag, _ in found.elements].count("script")
    assert scripts == [tag for tag, _ in plain.elements].count("script")
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert not any("javascript:" in attributes.get(name, "") for name in ("href", "src", "action"))
        assert tag not in ("img", "a", "link", "iframe") or not attributes.get("src", "").startswith("//")


# ---- files of adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tiny: model.CausalLM, tmp_path: Path) -> Path:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, targets=["q_proj"]), seed=0)
    for layer in adapter.layers.values():
        layer.lora_B.data.fill_(0.1)
    lora.save_adapter(adapter, tmp_path / "adapter", "m")
    lora.detach(tiny.model, adapter)
    return tmp_path / "adapter"


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


ENTRY = '{"x": {"dtype": "F32", "shape": [%s], "data_offsets": [%s]}}'
HEADERS = {
    "huge header": header(2**62, b"{}"),
    "longer than the file": header(10**6, b"{}"),
    "no JSON": header(4, b"####"),
    "empty": b"",
    "huge tensor": header(80, (ENTRY % (2**40, f"0, {2**42}")).ljust(80).encode()),
    "overflow": header(120, (ENTRY % (f"{2**62}, {2**62}", "0, 16")).ljust(120).encode()),
    "offsets that go back": header(80, (ENTRY % ("4", "16, 0")).ljust(80).encode() + b"\0" * 16),
    "pickle": b"\x80\x04cos\nsystem\n",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_or_hostile_file_of_weights_is_refused(tiny: model.CausalLM, foreign: Path, name: str) -> None:
    (foreign / lora.WEIGHTS).write_bytes(HEADERS[name])
    with pytest.raises(AdapterError, match="cannot be read as an adapter"):
        lora.load_adapter(tiny.model, foreign)
    assert not any(isinstance(m, lora.LoraLayer) for m in tiny.model.modules())


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "base_model.model.__class__.lora_A.weight", "x" * 5000, "a\nb\x1b[31m"]
)
def test_tensors_of_other_names_are_refused_and_name_nothing_here(
    tiny: model.CausalLM, foreign: Path, name: str
) -> None:
    tensors = load_file(foreign / lora.WEIGHTS)
    before = sorted(foreign.parent.rglob("*"))
    save_file({**tensors, name: next(iter(tensors.values())).clone()}, foreign / lora.WEIGHTS)
    with pytest.raises(AdapterError, match="belongs to another model"):
        lora.load_adapter(tiny.model, foreign)
    assert sorted(foreign.parent.rglob("*")) == before


@pytest.mark.parametrize("target", ["../q_proj", "/etc/passwd", "__class__", "q_proj.weight", ""])
def test_targets_that_are_no_layers_are_refused(tiny: model.CausalLM, foreign: Path, target: str) -> None:
    path = foreign / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": [target]}))
    with pytest.raises(AdapterError):
        lora.load_adapter(tiny.model, foreign)


def test_saving_replaces_a_link_and_not_what_it_points_to(tiny: model.CausalLM, foreign: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary").write_text("mine")
    (tmp_path / "out").symlink_to(precious)
    lora.save_adapter(lora.load_adapter(tiny.model, foreign), tmp_path / "out", "m")
    assert [file.name for file in precious.iterdir()] == ["diary"] and not (tmp_path / "out").is_symlink()


# ---- the key of a server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "chat"), [(200, False), (200, True), (401, False)])
def test_the_key_is_in_no_file_and_no_output_of_a_run(
    tiny_config: Config, serve, status: int, chat: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stage against a server that repeats the key, in its answers or in its refusal."""
    asked: list[str | None] = []

    def act(request) -> None:
        asked.append(request.headers["Authorization"])
        if chat and request.path != "/v1/chat/completions":
            reply(request, b"{}", 404)
            return
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"4 {KEY}"},
            "text": f"4 {KEY}",
            "finish_reason": "stop",
            "token_ids": [9, 2],
        }
        body = (
            {"choices": [choice], "usage": {"prompt_tokens": 8}}
            if status == 200
            else {"error": {"message": f"Bearer {KEY} is not known"}}
        )
        reply(request, json.dumps(body).encode(), status)

    sampling = {"engine": "openai", "base_url": serve(act), "samples": 1, "max_new_tokens": 4}
    tree = tiny_config.model_dump() | {"rollouts": sampling}
    tree["train"]["warmup_steps"] = 0
    run = Run(Config.model_validate(tree))
    with run.locked():
        run.execute("problems")
        try:
            run.execute("rollouts")
        except RmxError as fault:
            chain, seen = [], fault
            while seen is not None:
                chain.append(repr(seen))
                seen = seen.__cause__ or seen.__context__
            assert KEY not in " ".join(chain)
            assert status == 401
        else:
            assert status == 200
    assert asked and set(asked) == {f"Bearer {KEY}"}  # the server did get it
    files = [path for path in run.dir.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert KEY not in said.out + said.err


def test_the_key_in_a_completion_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMX_API_KEY", KEY)
    by_text = SimpleNamespace(
        dialect=SimpleNamespace(prompt="text"),
        lm=SimpleNamespace(tokenizer=lambda text, **_: {"input_ids": list(text.encode())}),
    )
    ids = remote.Server._read(by_text, "http://127.0.0.1", remote.Choice(text=f"4 {KEY}!"))
    assert bytes(ids) == b"4 [RMX_API_KEY]!"
