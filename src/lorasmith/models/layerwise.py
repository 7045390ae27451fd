"""A causal language model of which one decoder layer at a time is in memory, to see what its layers get.

The architecture is built without weights; embeddings and the like are filled once, a decoder layer when its
turn comes. The model's own forward is run each time, so that masks, positions and what else it hands to its
layers are its own; layers before the one in turn pass their input on, and what lies behind is never reached.
Rows go through one by one: no padding, and no token has to be left out of a statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorasmith.errors import CheckpointError
from lorasmith.models.load import quiet_libraries

ReadTensor = Callable[[str], torch.Tensor]
"""Gives the float32 values of a tensor by its name in the module tree; `KeyError` where there is none."""
Watch = Callable[[str, torch.Tensor], None]
"""Told the path of a linear layer below its decoder layer, and what it gets for one row [T, I]."""


class UnsupportedLayers(CheckpointError):
    """The architecture cannot be run layer by layer."""


class LayerwiseModel:
    """The model in `folder`, whose tensors come from `read`."""

    def __init__(self, folder: Path, read: ReadTensor, device: torch.device) -> None:
        self._read = read
        self._device = device
        self._model = _empty_model(folder)
        self.path, self._layers = _decoder_layers(self._model, folder)
        self._where = folder
        turns = nn.ModuleList(_Turn(number, layer, self) for number, layer in enumerate(self._layers))
        owner, _, name = self.path.rpartition(".")
        setattr(self._model.get_submodule(owner), name, turns)
        self.active = 0
        self.input: torch.Tensor | None = None
        self.as_tuple = False
        """Whether layers return their hidden states as the first of several things."""
        self._fill_surroundings()

    @property
    def count(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    def _fill_surroundings(self) -> None:
        """All but the decoder layers and the head: embeddings, positions, norms before them."""
        head = self._model.get_output_embeddings()
        embedding = self._model.get_input_embeddings()
        for path, module in self._model.named_modules():
            if module is head and module is not embedding:
                continue
            if not (path == self.path or path.startswith(self.path + ".")):
                self._fill(path, module)

    def _fill(self, path: str, module: nn.Module) -> None:
        """A module's own buffers and parameters, without its children's."""
        buffers = [name for name, held in module.named_buffers(recurse=False) if held.is_meta]
        for name in buffers:
            setattr(module, name, torch.empty_like(getattr(module, name), device=self._device))
        stored = {}
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                stored[name] = self._stored(f"{path}.{name}" if path else name, parameter)
        if buffers:
            # transformers computes what a checkpoint does not hold here, rotary frequencies for example.
            with torch.no_grad():
                self._model._init_weights(module)
        for name in buffers:
            if name not in module._non_persistent_buffers_set:
                getattr(module, name).copy_(self._stored(f"{path}.{name}", getattr(module, name)))
        for name, value in stored.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _stored(self, name: str, wanted: torch.Tensor) -> torch.Tensor:
        try:
            value = self._read(name)
        except KeyError as error:
            raise UnsupportedLayers(
                f"the model has no tensor of its own for {name}, as this architecture needs it",
                where=self._where,
                expected="a checkpoint that names its tensors as the architecture does",
                remedy="give --rounding dithered, which needs no forward passes",
            ) from error
        if value.shape != wanted.shape:
            raise CheckpointError(
                f"{name} has the shape {list(value.shape)}",
                where=self._where,
                expected=f"{list(wanted.shape)}",
            )
        return value.to(self._device, torch.float32)

    def embed(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the first decoder layer gets for each row of token ids: [T, H] on the processor."""
        self.active = -1
        return [self._run(ids, None).cpu() for ids in rows]

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights, for as long as the context lasts."""
        layer = self._layers[number]
        for path, module in layer.named_modules():
            self._fill(f"{self.path}.{number}.{path}" if path else f"{self.path}.{number}", module)
        self.active = number
        try:
            yield layer
        finally:
            layer.to("meta")

    def advance(self, ids: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """What the layer in turn makes of one row's hidden states [T, H]."""
        return self._run(ids, hidden)

    def _run(self, ids: Sequence[int], hidden: torch.Tensor | None) -> torch.Tensor:
        self.input = None if hidden is None else hidden.to(self._device)[None]
        try:
            with torch.inference_mode():
                self._model(input_ids=torch.tensor([list(ids)], device=self._device), use_cache=False)
        except _Reached as reached:
            return reached.hidden[0]
        finally:
            self.input = None
        raise AssertionError("the model finished without its decoder layers")


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("the layer in turn is done")
        self.hidden = hidden


class _Turn(nn.Module):
    """Stands for one decoder layer in the model's own list."""

    def __init__(self, number: int, layer: nn.Module, owner: LayerwiseModel) -> None:
        super().__init__()
        # Some models read such marks of their layers (attention_type, is_sliding, …).
        for name, value in vars(layer).items():
            if (
                not name.startswith("_")
                and name != "training"
                and isinstance(value, str | int | float | bool)
            ):
                setattr(self, name, value)
        self._number = number
        # Not registered: the list stands for the layers, and must not hold them a second time.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_owner", owner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on, or run the layer in turn and end the forward there."""
        owner: LayerwiseModel = self._owner  # type: ignore[assignment]
        given = args[0] if args else kwargs["hidden_states"]
        if owner.active < 0:
            raise _Reached(given)
        if self._number < owner.active:
            return (given,) if owner.as_tuple else given
        assert owner.input is not None
        if args:
            args = (owner.input, *args[1:])
        else:
            kwargs["hidden_states"] = owner.input
        result = self._layer(*args, **kwargs)  # type: ignore[operator]
        owner.as_tuple = isinstance(result, tuple)
        raise _Reached(result[0] if owner.as_tuple else result)


@contextmanager
def watched(layer: nn.Module, paths: Sequence[str], watch: Watch) -> Iterator[None]:
    """Tell `watch` what the linear layers at `paths` below a decoder layer get."""

    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            watch(path, args[0])

        return hook

    hooks = [layer.get_submodule(path).register_forward_pre_hook(hook_of(path)) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _empty_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
                )
    except Exception as error:  # transformers lets errors of many libraries through
        raise UnsupportedLayers(
            f"the architecture cannot be built: {type(error).__name__}: {error}",
            where=folder,
            expected="a causal language model that transformers knows",
            remedy="give --rounding dithered, which needs no forward passes",
        ) from error
    return model.eval()


def _decoder_layers(model: Any, folder: Path) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers: as long as the config says, and the first of its kind."""
    wanted = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted and path:
            return path, list(module)
    raise UnsupportedLayers(
        f"{type(model).__name__} has no list of {wanted} decoder layers",
        where=folder,
        remedy="give --rounding dithered, which needs no forward passes",
    )
