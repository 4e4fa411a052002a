"""A step that is captured, compiled or resumed must train what a step that is run as it is written trains."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from graph_stand_in import Replay
from safetensors.torch import load_file

from facevae.bench.workloads import LibraryStep, Recipe, result_row
from facevae.config import make_config
from facevae.core import FaceVAEError
from facevae.data.store import FaceStore
from facevae.model.losses import loss_terms, weight_terms
from facevae.model.vae import FaceVAEOutput
from facevae.training import step as step_module
from facevae.training import trainer as trainer_module
from facevae.training.step import StepMode
from facevae.training.trainer import Trainer, train

GRAPH, COMPILED = StepMode(False, True, "for a test"), StepMode(True, False, "for a test")
SMALL = {"size": 36, "width": 0.125, "latent_dim": 8, "precision": "fp32", "threads": 1, "batch_size": 8}


def make_trainer(store, mode=None, hypothesis="H9", **overrides):
    config = make_config(hypothesis, "quick", overrides=SMALL | {"steps": 12} | overrides)
    return Trainer(config, FaceStore(store), Accelerator(mixed_precision="no"), mode=mode)


def take(trainer, steps):
    """The loss terms of some steps, settled after the third as `train` does it."""
    values = []
    for step in steps:
        values.append({name: float(value) for name, value in trainer.step(step).items()})
        if step == 2:
            trainer.settle(3)
    return values


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.vae.state_dict().items()}


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    """What stands in for a GPU is one only where there is none."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def stand_in(monkeypatch):
    """Captures on a processor; the graphs that were made."""
    graphs = []

    def capture(function):
        graphs.append(Replay(function))
        return graphs[-1]

    monkeypatch.setattr(step_module, "capture_graph", capture)
    return graphs


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("feed", ["streamed", "resident"])
@pytest.mark.parametrize("hypothesis", ["H9", "H3"])
def test_a_captured_step_trains_the_same(store, stand_in, hypothesis, feed):
    """The rate changes at each step (one-cycle), images are mirrored, and a validation comes in between."""
    eager, captured = (make_trainer(store, mode, hypothesis, feed=feed) for mode in (None, GRAPH))
    for part in (range(7), range(7, 12)):
        assert take(eager, part) == take(captured, part)
        assert eager.validate() == captured.validate()
    same(weights(eager), weights(captured))
    (graph,) = stand_in
    assert graph.count == 9, "all but the first three were replayed"


def test_capturing_changes_nothing(store, stand_in):
    trainer = make_trainer(store, GRAPH)
    take(trainer, range(2))
    before = (
        weights(trainer),
        [tensor.clone() for state in trainer.optimizer.variables() for tensor in state.values()],
    )
    trainer.settle(2)
    same(before[0], weights(trainer))
    after = [tensor for state in trainer.optimizer.variables() for tensor in state.values()]
    assert all(map(torch.equal, before[1], after)) and len(stand_in) == 1


def test_a_captured_step_sees_what_is_loaded_into_it(store, stand_in):
    """Weights and moments that are written into their places, as a checkpoint's are."""
    eager, captured = make_trainer(store), make_trainer(store, GRAPH)
    take(eager, range(6)), take(captured, range(4))
    captured.vae.load_state_dict(weights(eager))
    for state, other in zip(captured.optimizer.variables(), eager.optimizer.variables()):
        for name, tensor in state.items():
            tensor.copy_(other[name])
    assert take(captured, range(6, 9)) == take(eager, range(6, 9))


@pytest.fixture
def captured_runs(stand_in, monkeypatch):
    monkeypatch.setattr(trainer_module, "choose_step_mode", lambda *_: GRAPH)
    return stand_in


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.8}, {"optimizer": "muon", "ema_decay": 0.8}])
def test_a_run_of_captured_steps_goes_on_as_if_undisturbed(store, captured_runs, tmp_path, options):
    settings = SMALL | {"steps": 14, "validate_every": 5, "checkpoint_every": 5, "log_every": 1}
    config = make_config("H9", "quick", overrides=settings | options)
    whole = train(config, store, tmp_path / "whole", progress=False)
    real = Trainer.step

    def interrupted(trainer, step):
        if step == 9:
            raise KeyboardInterrupt
        return real(trainer, step)

    with patch.object(Trainer, "step", interrupted), pytest.raises(KeyboardInterrupt):
        train(config, store, tmp_path / "other", progress=False)
    other = train(config, store, tmp_path / "other", progress=False)
    same(load_file(whole / "model.safetensors"), load_file(other / "model.safetensors"))
    logs = [(path.parent / "log.jsonl").read_text().splitlines() for path in (whole, other)]
    losses = [[(line["step"], line["raw"]) for line in map(json.loads, lines)] for lines in logs]
    assert losses[0] == losses[1]
    assert [graph.count for graph in captured_runs] == [11, 6, 6]
    status = json.loads((tmp_path / "whole" / "status.json").read_text())
    assert (status["step_mode"], status["step_asked"], status["step_reason"]) == (
        "graph",
        "graph",
        "for a test",
    )


def test_the_model_of_a_run_is_the_moving_average_of_its_weights(store, tmp_path):
    settings = SMALL | {"steps": 20, "validate_every": 20, "checkpoint_every": 20, "ema_decay": 0.9}
    config = make_config("H9", "quick", overrides=settings)
    model = load_file(train(config, store, tmp_path / "run", progress=False) / "model.safetensors")
    (path,) = (tmp_path / "run" / "checkpoint").glob("step-*")
    checkpoint, trainer = load_file(path), make_trainer(store, **settings)
    for index, (name, parameter) in enumerate(trainer.vae.named_parameters()):
        average, last = checkpoint[f"optimizer.{index}.average"], checkpoint[f"model.{name}"]
        assert model[name].equal(average), name
        assert not average.equal(last) or not parameter.requires_grad, name
    assert "ema_decay" not in make_config("H9").model_dump(), "digests of older runs stay as they are"


def test_a_term_that_is_not_finite_is_found_by_a_captured_step(store, captured_runs, tmp_path):
    config = make_config(
        "H7", "quick", overrides=SMALL | {"steps": 30, "learning_rate": 1e30, "log_every": 10}
    )
    with pytest.raises(FaceVAEError, match=r"was not finite at step [1-9]\b"):
        train(config, store, tmp_path / "run", progress=False)


def test_a_step_that_reads_a_tensor_is_not_captured(store, stand_in, monkeypatch):
    """It goes on as it was, and says so; asked for by name, it is an error."""
    monkeypatch.setattr(step_module.FiniteWatch, "record", lambda self, step, values: float(values.sum()))
    eager, trainer = make_trainer(store), make_trainer(store, GRAPH)
    with pytest.warns(UserWarning, match="could not be captured.*runs as eager. graph=off"):
        values = take(trainer, range(5))
    assert values == take(eager, range(5)) and not stand_in
    assert trainer.mode.fields()["step_mode"] == "eager" and trainer.mode.asked == "graph"
    assert "_local_scalar_dense waits" in trainer.mode.reason
    with pytest.raises(FaceVAEError, match="graph=auto"):
        take(make_trainer(store, GRAPH, graph="on"), range(3))


def test_a_step_that_waits_is_recognised():
    values = torch.rand(3)
    for wrong in (lambda: values.sum().item(), lambda: float(values[0]), lambda: values[values > 0.5]):
        with pytest.raises(RuntimeError, match="waits for the device"):
            Replay(wrong)


def compiler(backend):
    real = torch.compile
    return lambda function: real(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("terms", ["ssim+l1+l2", "ssim+l1+l2+mask"])
def test_a_compiled_step_trains_the_same(store, monkeypatch, terms):
    """Forward pass, losses and gradients traced as one function; the code generator is left out."""
    monkeypatch.setattr(trainer_module, "compile_function", compiler("aot_eager"))
    one, other = (make_trainer(store, mode, terms) for mode in (None, COMPILED))
    for value, expected in zip(take(other, range(2)), take(one, range(2))):
        assert value == pytest.approx(expected, rel=1e-4)
    assert other.mode.compiled, "it went back to the uncompiled step"
    for value, expected in zip(other.optimizer.gradients(), one.optimizer.gradients()):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=2e-5)


@pytest.mark.slow
def test_compiled_code_computes_the_same_losses(tmp_path, monkeypatch):
    """As the code generator writes them; for a GPU it writes other code from the same trace."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def losses(recon, mask_logits, mean, log_std, images, mask):
        out = FaceVAEOutput(recon, mask_logits, mean, log_std, mean)
        return sum(weight_terms(loss_terms(out, images, mask, ("ssim", "l1", "l2"))).values())

    torch.manual_seed(0)
    images, mask = torch.rand(2, 2, 3, 16, 16), torch.rand(2, 2, 1, 16, 16)
    leaves = [images[0], mask[0], *torch.randn(2, 2, 4)]
    results = []
    for function in (losses, torch.compile(losses, fullgraph=True)):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        value = function(*inputs, images[1], mask[1])
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in inputs)])
    assert any(tmp_path.rglob("*.so"))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def broken(function):
    """Compiles to something that fails on the way back, after the running statistics have changed."""

    def compiled(*arguments):
        raw = function(*arguments)
        raw["kl"].register_hook(lambda gradient: 1 / 0)
        return raw

    return compiled


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so(store, monkeypatch):
    monkeypatch.setattr(trainer_module, "compile_function", broken)
    trainer, plain = make_trainer(store, COMPILED), make_trainer(store)
    with pytest.warns(UserWarning, match="could not be compiled.*division by zero.*compile=off"):
        values = take(trainer, range(4))
    assert values == take(plain, range(4))
    same(weights(trainer), weights(plain))
    fields = trainer.mode.fields()
    assert (fields["step_mode"], fields["step_asked"]) == ("eager", "compiled")
    assert "division by zero" in fields["step_reason"]


def test_a_benchmark_row_says_what_ran_and_what_was_asked_for(store, monkeypatch):
    monkeypatch.setattr(trainer_module, "compile_function", broken)
    config = make_config("H9", "quick", overrides=SMALL)
    recipe = Recipe("quick", config, store, FaceStore(store), torch.device("cpu"))
    with pytest.warns(UserWarning, match="could not be compiled"):
        workload = LibraryStep(recipe, "fp32", COMPILED).workload
    row = result_row("quick", config, workload, [0.1])
    assert (row["step_mode"], row["step_asked"]) == ("eager", "compiled")
    assert "division by zero" in row["step_reason"] and "compiled" not in row


def test_what_was_asked_for_and_fails_is_an_error(store, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer_module, "compile_function", broken)
    for setting, words in (
        ("compile", "could not be compiled.*compile=auto"),
        ("graph", "needs a GPU.*graph=auto"),
    ):
        config = make_config("H9", "quick", overrides=SMALL | {"steps": 4, setting: "on"})
        with pytest.raises(FaceVAEError, match=words):
            train(config, store, tmp_path / setting, progress=False)


def suggested(tensor):
    """The memory format in which torch reads a tensor; plain where its strides could be either."""
    strides, least = tensor.stride(), 0
    for axis in (1, 3, 2, 0):
        if strides[axis] < least or (axis == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[axis] * max(1, tensor.shape[axis])
    return torch.channels_last


def test_gradients_lie_where_a_compiler_expects_them(store, monkeypatch):
    """On a GPU the gradient of a weight lies as input and output do; a compiler asks input and weight."""

    class Convolutions(torch.utils._python_dispatch.TorchDispatchMode):
        seen, wrong = 0, []

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten.convolution_backward.default:
                images, weight = arguments[1:3]
                formats = {suggested(images), suggested(weight)}
                expected = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
                self.seen += 1
                if suggested(images.contiguous(memory_format=expected)) != expected:
                    self.wrong.append(tuple(weight.shape))
            return function(*arguments, **(keywords or {}))

    trainer = make_trainer(store, width=0.25)
    with Convolutions() as convolutions:
        trainer.step(0)
    assert convolutions.seen == len([p for p in trainer.vae.parameters() if p.dim() == 4]) > 20
    assert not convolutions.wrong


def test_biases_that_normalisation_cancels_stay_where_they_are(store):
    trainer = make_trainer(store)
    take(trainer, range(3))
    biases = {name: p for name, p in trainer.vae.named_parameters() if not p.requires_grad}
    assert len(biases) == len([m for m in trainer.vae.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert all(name.endswith("0.bias") and not p.any() for name, p in biases.items())


def test_old_checkpoints_are_gone_on_with(store, tmp_path):
    """One whose biases have moved, and whose moments were saved variable by variable."""
    from facevae.model.tensors import save_tensors
    from facevae.training.checkpoint import load_checkpoint

    trainer = make_trainer(store)
    optimizer = torch.optim.Adam([p.detach().clone().requires_grad_() for p in trainer.vae.parameters()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    tensors = {
        f"optimizer.{index}.{name}": value for index, one in state.items() for name, value in one.items()
    }
    parameters = dict(zip(dict(trainer.vae.named_parameters()), optimizer.param_groups[0]["params"]))
    tensors |= {
        f"model.{name}": parameters.get(name, value) for name, value in trainer.vae.state_dict().items()
    }
    save_tensors(tmp_path / "step-00000001.safetensors", tensors, {"step": 1})
    assert load_checkpoint(tmp_path, trainer.vae, trainer.optimizer)["step"] == 1
    assert all(map(torch.equal, trainer.vae.parameters(), parameters.values()))
    for mine, theirs in zip(trainer.optimizer.variables(), state.values()):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    trainer.step(1)
    assert trainer.optimizer.variables()[0]["step"] == 2
