"""Models that others wrote: three of transformers, built small and without a download, and a scriptable TCN."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from captured import reloaded_script
from layers import change_parts
from tcn import NORMED, TemporalConvNet
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from whole_models import hook_weight_norm, hooks_of, normed_weight, train

import explicit_wn
from explicit_wn import convert, fold, report

# transformers' own properties and attention code warn when they are traced
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning:transformers|torch.nn.functional"),
    pytest.mark.filterwarnings("ignore:.*functools.lru_cache.*fsdp:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]


# The models of transformers


def hifi_gan() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    return transformers.SpeechT5HifiGan(config)


SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    # nothing random in training mode, so that two models can be trained side by side
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def wav2vec2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SPEECH))


def hubert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.HubertModel(transformers.HubertConfig(**SPEECH))


class FirstOutput(nn.Module):
    """A model of transformers whose output is one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x, return_dict=False)[0]
        return output


@attrs.frozen
class RealModel:
    kind: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dims: dict[str, int]
    """The normed weights, and the dimension that each norm keeps."""

    def __str__(self) -> str:
        return self.kind

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(7))

    def original(self, seed: int = 1) -> nn.Module:
        """The model in eval mode, in the spelling that transformers gives it, with weights that matter."""
        torch.manual_seed(seed)
        model = self.make()
        if hasattr(model, "apply_weight_norm"):
            for parameter in model.parameters():  # they are so small at first that every output is nearly 0
                nn.init.normal_(parameter, std=0.3)
            model.apply_weight_norm()
        model = (model if self.kind == "SpeechT5HifiGan" else FirstOutput(model)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("original0", "weight_g")):
                    parameter.mul_(2)
        return model

    def converted(self, seed: int = 1) -> nn.Module:
        model = self.original(seed)
        assert sorted(convert(model)) == sorted(self.dims)
        return model

    def by_hand(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model without any norm gives, with the weights that the parts of `model` make."""
        plain = fold_by_hand(self.original())
        state = {key.replace("weight_g", "weight").replace("weight_v", "weight"): 0 for key in model.state_dict()}
        for key in state:
            parts = dict(model.state_dict())
            state[key] = normed_weight(parts, key, self.dims[key]) if key in self.dims else parts[key]
        plain.load_state_dict(state)
        with torch.no_grad():
            output: Tensor = plain.eval()(x)
        return output


def fold_by_hand(model: nn.Module) -> nn.Module:
    """torch's own removal."""
    for module in list(model.modules()):
        if hasattr(module, "parametrizations"):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    return model


CONVOLUTIONS = [
    "conv_pre",
    "upsampler.0",
    "upsampler.1",
    *(f"resblocks.{block}.convs{kind}.{index}" for block in (0, 1) for kind in (1, 2) for index in (0, 1)),
    "conv_post",
]
POSITIONS = {"model.encoder.pos_conv_embed.conv.weight": 2}

MODELS = [
    RealModel("SpeechT5HifiGan", hifi_gan, (2, 12, 8), {f"{name}.weight": 0 for name in CONVOLUTIONS}),
    RealModel("Wav2Vec2Model", wav2vec2, (2, 200), POSITIONS),
    RealModel("HubertModel", hubert, (2, 200), POSITIONS),
]
models = pytest.mark.parametrize("real", MODELS, ids=str)


@models
def test_it_converts_to_the_same_numbers_on_the_same_parameters(real: RealModel) -> None:
    model, original, x = real.original(), real.original(), real.input()
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {row.spelling for row in report(model).rows if row.norm} == {"parametrization"}
    assert sorted(convert(model)) == sorted(real.dims)
    assert {row.spelling for row in report(model).rows if row.norm} == {"ours"}
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert hooks_of(model) == []
    expected = original(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x), expected)
    change_parts(model, seed=1)
    output = model(x).detach()
    torch.testing.assert_close(output, real.by_hand(model, x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, expected, atol=1e-2)


@models
def test_it_trains_like_its_original(real: RealModel) -> None:
    model, original, x = real.original().train(), real.original().train(), real.input()
    parameters, others = list(model.parameters()), list(original.parameters())
    convert(model)
    for one, values in ((model, parameters), (original, others)):
        train(one, torch.optim.Adam(values, 1e-3), (x,), steps=2)
    torch.testing.assert_close(parameters, others)
    torch.testing.assert_close(model.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-5)


@models
@pytest.mark.filterwarnings("ignore:.*functools.lru_cache:UserWarning")  # torch 2.10, about transformers
@pytest.mark.parametrize("way", ["export", "trace", "compile"])
def test_it_exports_traces_and_compiles(real: RealModel, way: str) -> None:
    model, x = real.converted(), real.input()
    capture: dict[str, Callable[[], Any]] = {
        "export": lambda: torch.export.export(model, (x,)).module(),
        "trace": lambda: torch.jit.trace(model, x, check_trace=False),
        "compile": lambda: torch.compile(model, backend="aot_eager", fullgraph=True),
    }
    captured = capture[way]()
    torch.testing.assert_close(captured(x), model(x), rtol=1e-4, atol=1e-5)
    owner = model if way == "compile" else captured
    change_parts(owner, seed=1)
    torch.testing.assert_close(captured(x).detach(), real.by_hand(owner, x), rtol=1e-4, atol=1e-5)


@models
def test_it_folds_from_either_spelling(real: RealModel) -> None:
    x = real.input()
    for model in (real.original(), real.converted()):
        expected = model(x).detach()
        assert sorted(fold(model)) == sorted(real.dims)
        torch.testing.assert_close(model(x).detach(), expected)
        for name in real.dims:
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert type(layer) in (nn.Conv1d, nn.ConvTranspose1d)
        assert sorted(model.state_dict()) == sorted(fold_by_hand(real.original()).state_dict())


@models
def test_it_loads_the_checkpoint_of_its_original_and_the_other_way_round(real: RealModel) -> None:
    original, model, x = real.original(seed=1), real.converted(seed=2), real.input()
    assert not torch.allclose(model(x), original(x), atol=1e-2)
    model.load_state_dict(original.state_dict())
    torch.testing.assert_close(model(x), original(x))
    change_parts(model, seed=3)
    original.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), original(x))
    model.load_state_dict(fold_by_hand(real.original(seed=4)).state_dict())
    torch.testing.assert_close(model(x), real.original(seed=4)(x), rtol=1e-4, atol=1e-5)


@models
def test_copies_and_files_of_it_are_independent_of_it(real: RealModel, tmp_path: Path) -> None:
    model, x = real.converted(), real.input()
    model(x).sum().backward()  # torch's hook cannot be copied from here on, nor can its parametrization be saved
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    from_state = real.converted(seed=2)
    from_state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = model(x).detach()
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), from_state):
        torch.testing.assert_close(copied(x).detach(), expected)
        change_parts(copied, seed=1)
        torch.testing.assert_close(copied(x).detach(), real.by_hand(copied, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x).detach(), expected)


@pytest.mark.parametrize("real", MODELS[1:], ids=str)
def test_transformers_saves_and_loads_a_converted_model(real: RealModel, tmp_path: Path) -> None:
    model, x = real.converted(), real.input()
    model.model.save_pretrained(tmp_path)
    loaded = FirstOutput(type(model.model).from_pretrained(tmp_path)).eval()
    torch.testing.assert_close(loaded(x), model(x))
    convert(loaded)
    torch.testing.assert_close(loaded(x), model(x))


# The vocoder to ONNX


@pytest.mark.parametrize("folded", [False, True], ids=["converted", "folded"])
def test_the_vocoder_runs_in_onnx_runtime_at_any_length(folded: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    real = MODELS[0]
    model = real.converted()
    if folded:
        fold(model)
    dynamic = ({1: torch.export.Dim("frames", min=2, max=4096)},)
    program = torch.onnx.export(model, (real.input(),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(tmp_path / "vocoder.onnx")
    session = runtime.InferenceSession(tmp_path / "vocoder.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for frames in (12, 5, 31):
        x = torch.randn(2, frames, 8)
        (output,) = session.run(None, {name: x.numpy()})
        expected = model(x).detach() if folded else real.by_hand(model, x)
        assert output.shape == (2, frames * 4)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


# A TCN that TorchScript can compile


SEQUENCES = torch.linspace(-1, 1, 60).view(2, 3, 10)


def tcn(norm: Callable[[nn.Module], Any] = hook_weight_norm, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return TemporalConvNet(norm).eval()


def tcn_by_hand(model: nn.Module, x: Tensor = SEQUENCES) -> Tensor:
    plain = tcn(lambda layer: layer)
    state = dict(model.state_dict())
    for name in NORMED:
        state[name] = normed_weight(state, name, 0)
        del state[f"{name}_g"], state[f"{name}_v"]
    plain.load_state_dict(state)
    with torch.no_grad():
        output: Tensor = plain(x)
    return output


@pytest.fixture(params=[hook_weight_norm, parametrizations.weight_norm], ids=["hook", "parametrization"])
def converted_tcn(request: pytest.FixtureRequest) -> nn.Module:
    model = tcn(request.param)
    expected = model(SEQUENCES).detach()
    assert sorted(convert(model)) == sorted(NORMED)
    torch.testing.assert_close(model(SEQUENCES).detach(), expected)
    change_parts(model, seed=1)
    return model


@pytest.mark.parametrize("script", [torch.jit.script, explicit_wn.script], ids=["torch.jit", "explicit_wn"])
def test_a_converted_tcn_scripts_saves_loads_and_freezes(converted_tcn: nn.Module, script: Any) -> None:
    model = converted_tcn
    scripted = script(model)
    loaded = reloaded_script(scripted)
    frozen = torch.jit.freeze(script(copy.deepcopy(model)))
    frozen_and_loaded = reloaded_script(frozen)
    for way in (scripted, loaded, frozen, frozen_and_loaded):
        torch.testing.assert_close(way(SEQUENCES).detach(), tcn_by_hand(model))
    for way in (scripted, loaded):
        change_parts(way, seed=2)
        torch.testing.assert_close(way(SEQUENCES).detach(), tcn_by_hand(way))
    assert list(frozen.parameters()) == []
    assert "_weight_norm" not in str(frozen.inlined_graph)
    torch.testing.assert_close(model(SEQUENCES).detach(), tcn_by_hand(model))


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["explicit_wn"] = None  # importing it fails, as it would in a program in C++
import torch
folder = sys.argv[1]
x, expected = torch.load(f"{folder}/expected.pt")
ways = [torch.jit.load(f"{folder}/{name}.pt") for name in ("scripted", "frozen", "traced")]
ways.append(torch.export.load(f"{folder}/exported.pt2").module())
for way in ways:
    torch.testing.assert_close(way(x), expected)
"""


def test_what_is_saved_from_a_converted_tcn_needs_neither_the_package_nor_its_source(
    converted_tcn: nn.Module, tmp_path: Path
) -> None:
    model = converted_tcn
    torch.jit.script(model).save(tmp_path / "scripted.pt")
    torch.jit.freeze(explicit_wn.script(model)).save(tmp_path / "frozen.pt")
    torch.jit.trace(model, SEQUENCES).save(tmp_path / "traced.pt")
    torch.export.save(torch.export.export(model, (SEQUENCES,)), tmp_path / "exported.pt2")
    torch.save((SEQUENCES, tcn_by_hand(model)), tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_THE_PACKAGE, str(tmp_path)], check=True)


def test_a_scripted_tcn_trains_like_the_original_with_its_hook(converted_tcn: nn.Module) -> None:
    original = tcn()
    original.load_state_dict(converted_tcn.state_dict())
    scripted = torch.jit.script(converted_tcn.train())
    for model in (scripted, original.train()):
        train(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), (SEQUENCES,), steps=5)
    state = original.state_dict()
    for name, value in scripted.state_dict().items():
        torch.testing.assert_close(value, state[name])
    torch.testing.assert_close(scripted.eval()(SEQUENCES).detach(), tcn_by_hand(original))


def test_a_tcn_folds_as_its_hooks_left_it() -> None:
    model = tcn()
    change_parts(model, seed=1)  # behind the hooks: none of them has run since
    expected = tcn_by_hand(model)
    assert sorted(fold(model)) == sorted(NORMED)
    torch.testing.assert_close(model(SEQUENCES).detach(), expected)
    torch.testing.assert_close(torch.jit.freeze(torch.jit.script(model))(SEQUENCES).detach(), expected)
