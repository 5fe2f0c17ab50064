"""The tools that people train, shrink and save models with: each does to a normed model what it does to any other.

What is right is said by a twin of the model, which has the same parameters and computes g · v / ‖v‖ in plain functions;
the same tool is run on both.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import change_parts
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import explicit_wn
from explicit_wn import WeightNorm, fold


def package(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wn = WeightNorm()
        self.fc = self.wn.apply(nn.Linear(4, 8))
        self.out = self.wn.inline(nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.wn.recompute(self.fc)
        output: Tensor = self.out(torch.tanh(self.fc(x)))
        return output


class LinearByHand(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))  # the order is that of a normed layer: optimizers count
        self.weight_g = nn.Parameter(torch.rand(outputs, 1))
        self.weight_v = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_g * self.weight_v / self.weight_v.square().sum(1, keepdim=True).sqrt()
        return F.linear(x, weight, self.bias)


class Twin(nn.Module):
    """What a `Net` is to be, without a norm's object in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = LinearByHand(4, 8), LinearByHand(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(torch.tanh(self.fc(x)))
        return output


INPUTS, TARGETS = torch.linspace(-1, 1, 64).view(16, 4).sin(), torch.linspace(1, -1, 16).view(16, 1)
OTHERS = torch.linspace(-2, 2, 12).view(3, 4)


def pair(seed: int = 0) -> tuple[Net, Twin]:
    torch.manual_seed(seed)
    net, twin = Net(), Twin()
    twin.load_state_dict(net.state_dict())
    return net, twin


def twin_of(state: dict[str, Tensor]) -> Twin:
    twin = Twin()
    twin.load_state_dict(state)
    return twin


def loss_of(model: nn.Module, x: Tensor = INPUTS, y: Tensor = TARGETS) -> Tensor:
    return F.mse_loss(model(x), y)


def check_same(model: nn.Module, twin: nn.Module) -> None:
    """The parameters are the twin's, and so is the output, which was right with other parameters before."""
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model(OTHERS), twin(OTHERS))


def check_changed(model: nn.Module) -> None:
    start = pair()[0].state_dict()
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in model.state_dict().items())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8)


# Lightning


def lightning_fit(model: nn.Module, folder: Path, epochs: int, callbacks: Any = (), **options: Any) -> Any:
    """Trains `model`; returns the trainer."""
    lightning = package("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Tensor:
            return loss_of(self.model, *batch)

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        gradient_clip_val=0.5,
    )
    trainer.fit(Module(), batches(), **options)
    return trainer


quiet = pytest.mark.filterwarnings(  # theirs, and none of ours
    *("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    *("error::explicit_wn.StaleWeightWarning", "error::explicit_wn.LostWriteWarning"),
)


@quiet
def test_lightning_fits_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    models = pair()
    for model in models:
        lightning_fit(model, tmp_path, 2).save_checkpoint(tmp_path / f"{type(model).__name__}.ckpt")
    check_same(*models)
    check_changed(models[0])
    resumed = pair(seed=1)
    for model, file in zip(resumed, ("Net", "Twin"), strict=True):
        lightning_fit(model, tmp_path, 4, ckpt_path=tmp_path / f"{file}.ckpt", weights_only=False)
    check_same(*resumed)
    longer = pair()[0]
    lightning_fit(longer, tmp_path, 4)
    check_same(resumed[0], twin_of(longer.state_dict()))
    again = pair(seed=1)[0]  # each reads the other's
    lightning_fit(again, tmp_path, 4, ckpt_path=tmp_path / "Twin.ckpt", weights_only=False)
    check_same(again, resumed[1])


@quiet
def test_lightnings_stochastic_weight_averaging_averages_the_parts(tmp_path: Path) -> None:
    callbacks = package("lightning.pytorch.callbacks")
    models = pair()
    for model in models:
        averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1)
        lightning_fit(model, tmp_path, 5, [averaging])
    check_same(*models)
    plain = pair()[0]
    lightning_fit(plain, tmp_path, 5)
    assert not torch.allclose(plain(OTHERS), models[0](OTHERS), atol=1e-4)


class Forgetful(Net):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(torch.tanh(self.fc(x)))
        return output


def small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)


@quiet
def test_lightning_shows_what_is_said_of_a_weight_that_is_wrong(tmp_path: Path) -> None:
    warned = pytest.warns(explicit_wn.StaleWeightWarning, match=r"(?s)fc\.weight of .* is stale.*self\.wn\.recompute")
    with warned, pytest.raises(RuntimeError, match="backward through the graph a second time"):
        lightning_fit(Forgetful(), tmp_path, 1)
    net = pair()[0]
    net.apply(small)
    with pytest.warns(explicit_wn.LostWriteWarning, match=r"assign_all\(model, init\)") as told:
        trainer = lightning_fit(net, tmp_path, 1)
    ours = [str(one.message) for one in told if one.category is explicit_wn.LostWriteWarning]
    assert sorted(message.split()[0] for message in ours) == ["model.fc.weight", "model.out.weight"]
    assert not explicit_wn.check(net, trainer.optimizers[0])
    WeightNorm("bias").inline(net.out)  # after the optimizer was made
    found = [(row.name, row.problem) for row in explicit_wn.check(net, trainer.optimizers[0]).rows]
    assert found == [("out.bias_g", "not in the optimizer")]


# accelerate


@pytest.fixture
def accelerate() -> Any:
    module = package("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


def accelerate_train(accelerate: Any, model: nn.Module, folder: Path) -> nn.Module:
    """Three epochs, the last of which `load_state` undoes."""
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), batches())
    for epoch in range(3):
        if epoch == 2:
            accelerator.save_state(folder)
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_of(prepared, *batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
    accelerator.load_state(folder)
    unwrapped: nn.Module = accelerator.unwrap_model(prepared)
    return unwrapped


def test_accelerate_trains_saves_and_restores(accelerate: Any, tmp_path: Path) -> None:
    models = [accelerate_train(accelerate, model, tmp_path / type(model).__name__) for model in pair()]
    check_same(*models)
    check_changed(models[0])


def test_accelerate_fills_a_model_on_meta_and_keeps_one_on_disk(accelerate: Any, tmp_path: Path) -> None:
    package("safetensors")
    net, _ = pair()
    change_parts(net, seed=1)
    twin = twin_of(net.state_dict())
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    with accelerate.init_empty_weights():
        empty = Net()
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    loaded = accelerate.load_checkpoint_and_dispatch(empty, f"{tmp_path}/model.safetensors", device_map={"": "cpu"})
    check_same(loaded, twin)
    for offload in accelerate.cpu_offload, lambda model, device: accelerate.disk_offload(model, tmp_path, device):
        offloaded = offload(copy.deepcopy(net), torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(offloaded(OTHERS), twin(OTHERS))


# transformers


def of_transformers(model: nn.Module) -> Any:
    """A model of transformers around `model`."""
    transformers = package("transformers")

    class Pretrained(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = copy.deepcopy(model)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.model, x, labels)}

    return Pretrained(transformers.PretrainedConfig())


def transformers_train(model: Any, folder: Path, resume: Path | None = None) -> nn.Module:
    """Four steps of the Trainer, with a checkpoint every other."""
    transformers = package("transformers")
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        save_steps=2,
        use_cpu=True,
        seed=3,
    )
    data = [{"x": x, "labels": y} for x, y in zip(INPUTS, TARGETS, strict=True)]
    transformers.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
    trained: nn.Module = model.model
    return trained


@quiet
def test_the_trainer_of_transformers_trains_and_resumes(accelerate: Any, tmp_path: Path) -> None:
    models = [transformers_train(of_transformers(model), tmp_path / type(model).__name__) for model in pair()]
    check_same(*models)
    check_changed(models[0])
    resumed = transformers_train(of_transformers(pair(1)[0]), tmp_path / "resumed", tmp_path / "Twin/checkpoint-2")
    check_same(resumed, models[1])


def test_from_pretrained_reads_the_names_that_are_written_and_no_others(tmp_path: Path) -> None:
    safetensors = package("safetensors.torch")
    net, _ = pair()
    change_parts(net, seed=1)
    model = of_transformers(net)
    model.save_pretrained(tmp_path / "normed")
    written = safetensors.load_file(tmp_path / "normed/model.safetensors")
    assert set(written) == {f"model.{name}" for name in Twin().state_dict()}
    loaded = type(of_transformers(pair(seed=1)[0])).from_pretrained(tmp_path / "normed")
    check_same(loaded.model, twin_of(net.state_dict()))
    folded = copy.deepcopy(model)
    assert fold(folded) == ["model.fc.weight", "model.out.weight"]
    folded.save_pretrained(tmp_path / "folded")
    _, told = type(model).from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert told["missing_keys"] == {name for name in written if "weight" in name}
    plain = safetensors.load_file(tmp_path / "folded/model.safetensors")
    loaded.load_state_dict(plain)  # torch's way takes every spelling
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(OTHERS), net(OTHERS))


# Averages


@pytest.mark.parametrize("average", ["mean", "torch's EMA", "ema-pytorch"])
def test_an_average_is_one_of_the_parts_and_its_weights_are_made_of_it(average: str) -> None:
    averages = []
    models = pair()
    for model in models:
        model(OTHERS)  # a weight is stored when the average is made
        if average == "ema-pytorch":
            averages.append(package("ema_pytorch").EMA(model, beta=0.5, update_after_step=0, update_every=1))
        else:
            multi = None if average == "mean" else get_ema_multi_avg_fn(0.5)
            averages.append(AveragedModel(model, multi_avg_fn=multi))
        optimizer = optimizer_of(model)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            averages[-1].update() if average == "ema-pytorch" else averages[-1].update_parameters(model)
            averages[-1](OTHERS)
    check_same(*averages)
    assert not torch.allclose(averages[0](OTHERS), models[0](OTHERS), atol=1e-3)
    if average == "ema-pytorch":
        averages[0].update_model_with_ema()
        torch.testing.assert_close(models[0](OTHERS), averages[1](OTHERS))


# torchinfo


def test_torchinfo_counts_the_parts_and_shows_the_layer() -> None:
    torchinfo = package("torchinfo")
    net = nn.Sequential(WeightNorm().inline(nn.Conv1d(2, 3, 5)))
    columns = ("kernel_size", "output_size", "num_params")
    summary = torchinfo.summary(net, (1, 2, 16), verbose=0, col_names=columns)
    (row,) = [line.split() for line in str(summary).splitlines() if "Conv1d" in line]
    assert row == ["├─Conv1d:", "1-1", "[5]", "[1,", "3,", "12]", "36"]
    assert summary.trainable_params == 3 + 30 + 3


# Pruning


def test_pruning_v_prunes_the_weight() -> None:
    net, twin = pair()
    for model in net, twin:
        prune.l1_unstructured(model.fc, "weight_v", 3)  # type: ignore[no-untyped-call]
        optimizer = optimizer_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    check_same(net, twin)
    assert (net.fc.weight == 0).sum() == 3
    for model in net, twin:
        prune.remove(model.fc, "weight_v")  # type: ignore[no-untyped-call]
    check_same(net, twin)
    fold(net)
    assert (net.fc.weight == 0).sum() == 3


def test_pruning_a_weight_that_is_computed_is_refused_and_changes_nothing() -> None:
    net, twin = pair()
    for layer, form in ((net.fc, "WeightNorm"), (net.out, "WeightNorm")):
        with pytest.raises(AttributeError, match=rf"'weight' of this Linear is computed by {form}.* remove\(module\)"):
            prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
        assert not layer._forward_pre_hooks
    check_same(net, twin)
    fold(net)
    prune.l1_unstructured(net.fc, "weight", 3)  # type: ignore[no-untyped-call]
    assert (net.fc.weight == 0).sum() == 3


# PEFT


def lora(dora: bool = False) -> Any:
    """Two inlined layers with a LoRA around each, which is trained a little."""
    peft = package("peft")
    torch.manual_seed(0)
    wn = WeightNorm()
    net = nn.Sequential(wn.inline(nn.Linear(4, 8)), nn.Tanh(), wn.inline(nn.Linear(8, 1)))
    change_parts(net, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=3, use_dora=dora))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[key_of(name)], value) for name, value in before.items())
    return model


def key_of(name: str) -> str:
    """What PEFT calls a parameter of a layer that it wraps."""
    index, _, part = name.partition(".")
    return f"base_model.model.{index}.base_layer.{part}"


def lora_by_hand(model: nn.Module, alpha: float = 3.0) -> Tensor:
    """The output for `OTHERS`."""
    state, x = model.state_dict(), OTHERS
    for index in "0", "2":
        g, v, bias = (state[key_of(f"{index}.{part}")] for part in ("weight_g", "weight_v", "bias"))
        a, b = (state[f"base_model.model.{index}.lora_{one}.default.weight"] for one in "AB")
        weight = g * v / v.square().sum(1, keepdim=True).sqrt() + alpha / 2 * b @ a
        x = F.linear(torch.tanh(x) if index == "2" else x, weight, bias)
    return x


def test_peft_trains_a_lora_beside_a_norm_and_merges_it_once_the_norm_is_folded() -> None:
    model = lora()
    expected = lora_by_hand(model)
    assert (expected - lora_by_hand(model, alpha=0)).abs().max() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(model(OTHERS), expected)
        assert len(fold(model)) == 2
        torch.testing.assert_close(model(OTHERS), expected)
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(OTHERS), expected)
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_that_merges_into_a_norm_is_told_to_fold_first(safe: bool, saved: bool, dora: bool) -> None:
    model = lora(dora)
    base = lora_by_hand(model, alpha=0)
    merged = model.merge_and_unload(safe_merge=safe)
    used: Callable[[], Any] = merged.state_dict if saved else lambda: merged(OTHERS)
    with torch.no_grad(), pytest.warns(explicit_wn.LostWriteWarning, match=r"(?s)written into, .*fold\(model\)"):
        result = used()
    if saved:
        assert sum(name.endswith("weight_g") for name in result) == 2
    else:
        torch.testing.assert_close(result, base)


def test_peft_leaves_no_layer_for_a_recompute_from_outside() -> None:
    peft = package("peft")
    net = Net()
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["fc"], r=2))  # net.fc is a layer around it now
    with pytest.raises(ValueError, match="this module carries no norm, but modules within it do"):
        model(OTHERS)
