# SPDX-License-Identifier: Apache-2.0
"""The record beside trained weights, from which their network is built again."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar

import torch
import torch.nn as nn

from monai_deq.networks.blocks import RegistrationUpdate
from monai_deq.networks.checkpoints import load_weights
from monai_deq.networks.nets import (
    DEQRegistrationNet,
    GradientSettings,
    RegistrationNet,
    RestSettings,
    coarse_to_fine,
    gradirn_net,
    riir_net,
    set_coarse_solver,
    unrolling_net,
    voxelmorph_net,
)
from monai_deq.solvers import SolverSettings
from monai_deq.utils import json_ready, read_json, replace_file

__all__ = ["NetworkRecord", "build_component", "describe", "load_network", "read_record"]

#: packages whose classes a record may name
_ROOTS = ("monai_deq", "monai", "torch")
#: what is kept of the settings of version 0.1.0 beside the network's
_TRAINING = ("smoothness_weight", "learning_rate", "batch_size", "training_pairs", "epoch")


def describe(component: Any) -> Any:
    """Describe a network, its settings or a plain value as a MONAI component: ``{"_target_": ..., argument: value,
    ...}``, nested. Each argument of a class is read from its attribute of the same name; what the weights hold is left
    out.

    Raises:
        ValueError: When an argument cannot be read.
    """
    if is_dataclass(component) and not isinstance(component, type):
        return {
            "_target_": _target(component),
            **{f.name: describe(getattr(component, f.name)) for f in fields(component)},
        }
    if isinstance(component, nn.Module):
        description: dict[str, Any] = {"_target_": _target(component)}
        for name, parameter in inspect.signature(type(component).__init__).parameters.items():
            if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            # MONAI's losses keep spatial_dims as ndim
            attribute = "ndim" if name == "spatial_dims" and not hasattr(component, name) else name
            if hasattr(component, attribute):
                value = getattr(component, attribute)
                # what is learned is in the weights
                if not isinstance(value, torch.Tensor):
                    description[name] = describe(value)
            elif parameter.default is parameter.empty:
                raise ValueError(f"{type(component).__name__} does not keep its argument {name!r} as an attribute.")
        if not type(component).__module__.startswith("monai_deq."):
            with torch.random.fork_rng(devices=[]):
                again = build_component(description)
            if not _alike(component, again):
                raise ValueError(f"{type(component).__name__} cannot be built again from its attributes.")
        return description
    if isinstance(component, Mapping):
        return {str(k): describe(v) for k, v in component.items()}
    if isinstance(component, (list, tuple, range)):
        return [describe(v) for v in component]
    return json_ready(component)


def _target(component: Any) -> str:
    """Public name of a class: that of the outermost package that has it."""
    cls = type(component)
    parts = cls.__module__.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    home = next((m for m in modules if getattr(sys.modules.get(m), cls.__qualname__, None) is cls), cls.__module__)
    return f"{home}.{cls.__qualname__}"


def _made_with(module: nn.Module) -> dict[str, Any]:
    """What a module was made with; neither what it has learned, nor its mode, nor whether it is compiled."""
    plain, state = nn.Module(), module.state_dict()
    return {
        "weights": {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)},
        "buffers": {k: v for k, v in module.named_buffers() if k not in state},
        "children": dict(module.named_children()),
        **{k: v for k, v in vars(module).items() if not hasattr(plain, k)},
    }


def _alike(a: Any, b: Any) -> bool:
    """Whether two modules differ in what they have learned at most."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, nn.Module):
        return type(a) is type(b) and _alike(_made_with(a), _made_with(b))
    return bool(a == b) or (callable(a) and callable(b))


def build_component(description: Any) -> Any:
    """Build what :py:func:`describe` described. Nothing but classes of networks and settings is called.

    Raises:
        ValueError: When it names anything else, or a text that MONAI would run as an expression.
    """
    if isinstance(description, Mapping):
        values = {k: build_component(v) for k, v in description.items() if k != "_target_"}
        if "_target_" not in description:
            return values
        name = description["_target_"]
        cls = locate(name) if isinstance(name, str) and name.split(".")[0] in _ROOTS else None
        if not (isinstance(cls, type) and (issubclass(cls, nn.Module) or is_dataclass(cls))):
            raise ValueError(
                f"the record names {name!r}: expected a network or its settings from {', '.join(_ROOTS)}. Build the "
                "network yourself (network_def) and load its weights."
            )
        return cls(**values)
    if isinstance(description, list):
        return [build_component(v) for v in description]
    if isinstance(description, str) and description.startswith(("$", "@", "%")):
        raise ValueError(f"the record has the expression {description!r}: expected plain values.")
    return description


@dataclass(frozen=True)
class NetworkRecord:
    """What is known of trained weights, kept beside ``model.pt`` as ``model.json``.

    Args:
        network: description of the network, see :py:func:`describe`. ``None`` where there is none.
        method: name of the system. Defaults to ``"DEQReg"``.
        spatial_size: size in voxels that images are resampled to. Defaults to ``None``: as they are.
        steps: step limit of the solver in evaluation. Defaults to 48.
        preprocessing: further settings of the preprocessing: ``"window"`` and ``"orientation"``, see
            :py:func:`monai_deq.transforms.load_pair_transforms`. Defaults to none.
        training: what the training was, such as ``"training_pairs"``, ``"epoch"``. Defaults to nothing.
    """

    network: dict[str, Any] | None = None
    method: str = "DEQReg"
    spatial_size: list[int] | None = None
    steps: int = 48
    preprocessing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    #: file that it was read from
    file: ClassVar[Path | None] = None

    def build(
        self,
        coarse_solver: str | None = "plain",
        coarse_tolerance: float | None = 2e-4,
        autocast_dtype: str | None = None,
    ) -> RegistrationNet:
        """The network with fresh weights, in eval mode and with as many steps as the record says.

        Args:
            coarse_solver: solver of the coarser networks, where there are any. Defaults to ``"plain"``.
            coarse_tolerance: RMS residual in voxels at which these stop. Defaults to 2e-4.
            autocast_dtype: see :py:class:`monai_deq.networks.blocks.RegistrationUpdate`. Defaults to ``None``.

        Raises:
            ValueError: When the record has no network, or one that is not to be built.
        """
        if autocast_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f'autocast_dtype must be None, "bfloat16" or "float16", got {autocast_dtype!r}.')
        if self.network is None:
            where = f" in {self.file}" if self.file else ""
            raise ValueError(
                f"there is no record of the network{where}: name a checkpoint (ckpt_path) or give network_def."
            )
        try:
            network = build_component(self.network)
            if not isinstance(network, RegistrationNet):
                raise ValueError(f"the record describes a {type(network).__name__}, expected a registration network.")
            network.solver = network.solver.changed(max_steps=self.steps)
        except Exception as e:  # what the classes make of their arguments
            said = " ".join(str(e).split())
            raise ValueError(f"{self.file or 'the record'} describes no network: {said}") from e
        for module in network.modules():
            if isinstance(module, RegistrationUpdate):
                module.autocast_dtype = autocast_dtype
        set_coarse_solver(network, name=coarse_solver, tolerance=coarse_tolerance)
        return network.eval()

    def write(self, path: str | Path) -> None:
        """Write the record as JSON to a file, which appears whole or not at all."""
        text = json.dumps(json_ready(asdict(self)), indent=2, allow_nan=False)
        # sizes and channels on one line
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text)
        with replace_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def read_record(path: str | Path | None, spatial_dims: int | None = None) -> NetworkRecord:
    """Read the record of a checkpoint.

    Args:
        path: checkpoint file, whose record lies beside it (``model.pt`` or ``last.pt`` -> ``model.json``), or ``None``
            for a method that has none.
        spatial_dims: 2 or 3, what the network should be for. Defaults to ``None``: either.

    Raises:
        FileNotFoundError: When there is no such checkpoint or no record.
        ValueError: When the file holds no record, or that of a network for images of other dimensions.
    """
    if path is None:
        return NetworkRecord()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train first, or name a trained one (ckpt_path).")
    file = path.with_suffix(".json")
    if not file.is_file() and path.name == "last.pt":
        file = file.with_name("model.json")
    if not file.is_file():
        raise FileNotFoundError(
            f"no record at {file} beside {path}: restore it, or build the network yourself (network_def)."
        )
    content = read_json(file, "restore it")
    if isinstance(content, dict) and "network" not in content and "max_steps" in content:
        record = _from_settings(content)
    elif isinstance(content, dict) and isinstance(content.get("network"), (dict, type(None))):
        known = {f.name for f in fields(NetworkRecord)}
        record = NetworkRecord(**{k: v for k, v in content.items() if k in known})
    else:
        raise ValueError(f"{file} holds no record of a network.")
    _check_fields(record, file)
    object.__setattr__(record, "file", file)
    own = _spatial_dims(record.network)
    if spatial_dims is not None and own not in (None, spatial_dims):
        raise ValueError(
            f"{path} is of a {own}-D network, spatial_dims is {spatial_dims}: use the configuration it was trained "
            "with, for slices with slices.json, for volumes without."
        )
    return record


def _check_fields(record: NetworkRecord, file: Path) -> None:
    """Refuse what no record has in its fields."""

    def are_numbers(values: Any, *kinds: type) -> bool:
        return isinstance(values, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)

    size, steps, dims = record.spatial_size, record.steps, _spatial_dims(record.network)
    right = {name: isinstance(getattr(record, name), dict) for name in ("preprocessing", "training")}
    right |= {"method": isinstance(record.method, str), "steps": are_numbers([steps], int) and steps > 0}
    right["spatial_size"] = size is None or (are_numbers(size, int) and min(size, default=0) > 1)
    if right["preprocessing"]:
        window: Any = record.preprocessing.get("window")
        letters = record.preprocessing.get("orientation")
        of_window = are_numbers(window, int, float) and len(window) == 2 and window[0] < window[1]
        axes = {axis for axis in ("RL", "AP", "SI") for letter in str(letters) if letter in axis}
        of_axes = isinstance(letters, str) and len(letters) == len(axes) == (dims or len(letters))
        known = set(record.preprocessing) <= {"window", "orientation"}
        right["preprocessing"] = known and (window is None or of_window) and (letters is None or of_axes)
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise ValueError(f"{file}: no record has the {wrong[0]} {getattr(record, wrong[0])!r}: restore it.")


def _spatial_dims(description: Any) -> int | None:
    """The first one in the description of a network."""
    if isinstance(description, Mapping) and isinstance(description.get("spatial_dims"), int):
        return description["spatial_dims"]  # type: ignore[no-any-return]
    parts: Iterable[Any] = description.values() if isinstance(description, Mapping) else ()
    parts = description if isinstance(description, list) else parts
    return next((dims for dims in map(_spatial_dims, parts) if dims is not None), None)


def load_network(path: str | Path, **kwargs: Any) -> RegistrationNet:
    """Build a trained network from the record beside its checkpoint file, on the CPU and in eval mode, and load its
    weights; ``kwargs`` of :py:meth:`NetworkRecord.build`.

    Raises:
        FileNotFoundError: When there is no such checkpoint or no record.
        ValueError: When either is not readable, or they do not fit each other.
    """
    network = read_record(path).build(**kwargs)
    load_weights(network, path)
    return network


def _from_settings(settings: Mapping[str, Any]) -> NetworkRecord:
    """The record of weights of version 0.1.0, which kept the settings of the training in its place."""
    method, max_steps = settings.get("method", "DEQReg"), settings["max_steps"]
    # flags of the command line came as text
    if str(settings.get("unwarped_moving", False)).lower() == "true":
        raise ValueError("weights trained with unwarped_moving need version 0.1.0: the option is no more.")
    dims, own = settings.get("spatial_dims", 3), settings.get("method_settings", {})
    systems = {
        "VoxelMorph": lambda: voxelmorph_net(dims, own.get("integration_steps", 0)),
        "Unrolling": lambda: unrolling_net(dims, max_steps, own.get("num_levels", 3)),
        "GraDIRN": lambda: gradirn_net(dims, max_steps, own.get("num_levels", 3)),
        "RIIR": lambda: riir_net(dims, max_steps),
    }

    def equilibrium() -> DEQRegistrationNet:
        rest = {f.name: settings[f.name] for f in fields(RestSettings) if f.name in settings}
        network = DEQRegistrationNet(
            spatial_dims=dims,
            solver=SolverSettings(max_steps=max_steps, tolerance=settings.get("tolerance", 1e-3)),
            gradient=GradientSettings(
                settings.get("gradient", "phantom"),
                settings.get("phantom_steps", 2),
                settings.get("phantom_damping", 1.0),
                settings.get("num_states", 0),
            ),
            rest=RestSettings(**{**asdict(RestSettings(enabled=False)), **rest, "enabled": True}),
        )
        return coarse_to_fine(network, settings.get("coarser_levels", 0) + 1, settings.get("coarse_steps", 96))

    with torch.random.fork_rng(devices=[]):
        network = describe(systems.get(method, equilibrium)())
    return NetworkRecord(
        network=network,
        method=method,
        spatial_size=settings.get("spatial_size"),
        steps=settings.get("val_steps", max_steps),
        preprocessing={k: settings[k] for k in ("window",) if k in settings},
        training={k: settings[k] for k in _TRAINING if k in settings},
    )
