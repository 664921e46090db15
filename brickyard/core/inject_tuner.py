"""The PEFT tuner behind `inject`: how an adapter goes into a model, what its layers share, how it is stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from brickyard.core import inject_config, ranks, roles
from brickyard.core.errors import BadBrick, NotFinite, Refused, UnknownName, UsageError
from brickyard.core.inject_config import BrickyardConfig, check_matched
from brickyard.core.inject_layer import (
    FIXED,
    PLAIN,
    PREFIX,
    BadMix,
    Bound,
    BrickyardLinear,
    Leaf,
    Part,
    Plan,
    Shared,
    sides,
    warn_of_rank,
    why_not,
)
from brickyard.core.rows import BASE, check_names, named_rows
from brickyard.core.slim import Slimmed

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


class BrickyardTuner(BaseTuner):
    """PEFT tuner that holds the tensors that groups of layers share, and the step count of methods that draw."""

    prefix = PREFIX
    tuner_layer_cls = BrickyardLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # a method names its own targets
    uses_shared_state = True
    _pending: dict[str, tuple[Bound, Shared, dict[str, Tensor], dict[str, Tensor]]]
    _hook: Any = None
    slimmed: Mapping[str, Slimmed] = MappingProxyType({})  # of adapters that made layers of the base smaller

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the adapter over all layers it matches, then let PEFT put it in. Nothing is changed if it is refused.

        Not in PEFT's injection hooks: those run only for the first adapter of a model.
        """
        config = cast(BrickyardConfig, self.peft_config[adapter_name])
        self._check_name(model, adapter_name)
        if state_dict is not None:
            raise Refused("a state dict cannot say which layers share tensors; inject from a config, then load.")
        if not config.method:
            raise UsageError("BrickyardConfig(method=...) is missing: name the method, e.g. method='mos'.")
        module, options = inject_config.resolve(config.method, config.options)
        self._prepare_adapter_config(config, self.get_model_config(model))
        leaves = self._leaves(model, config)
        if hasattr(module, "fitted"):
            asked = vars(options)
            options = module.fitted(options, tuple(leaves.values()))
            config.options = {**config.options, **{k: v for k, v in vars(options).items() if v != asked[k]}}
        if config.seed is None:
            config.seed = int(torch.randint(2**31 - 1, ()))
        generator = torch.Generator().manual_seed(config.seed)
        plan = module.plan(options, tuple(leaves.values()), generator)
        _check_plan(config.method, plan, leaves)
        ranks.cut(plan, module, config.rank_pattern or {})
        if not config.init_weights:
            _fill_zeros(plan, generator)
        others = [(p, p.requires_grad) for attribute in self._containers() for p in attribute.parameters()]
        self._pending = self._prepare(model, adapter_name, config.method, module, options, leaves, plan)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if self._pending:
                raise Refused(f"PEFT left out {sorted(self._pending)[:3]}, which {config.method} had been planned for.")
        except BaseException:
            self._forget(adapter_name)
            raise
        finally:
            self._pending = {}
        # PEFT keeps the trainability of parameters inside the model only; a shared tensor lives on the tuner.
        for parameter, trains in others:
            parameter.requires_grad_(trains)
        if hasattr(module, "draw"):
            self._watch_steps(model, adapter_name)

    def _check_name(self, model: nn.Module, adapter: str) -> None:
        parts = {part for name, _ in (*model.named_modules(), *model.named_parameters()) for part in name.split(".")}
        parts |= {"base_model", "model", "base_layer", "original_module", "modules_to_save"}
        why = ""
        if not adapter or "." in adapter or adapter == BASE or hasattr(nn.ParameterDict, adapter):
            why = "is empty, holds a dot, or is a reserved word"
        elif adapter in PREFIX:
            why = f"is part of {PREFIX!r}, the prefix of our tensors, and PEFT would leave its weights at their start"
        elif adapter in parts:
            why = "is also the name of a module or parameter, and PEFT would drop that one's tensors when saving others"
        if why:
            raise Refused(f"adapter name {adapter!r} {why}; choose another, such as 'default' or 'task1'.")

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(BrickyardConfig, peft_config)
        if config.target_modules in (None, "all-linear"):
            _, options = inject_config.resolve(config.method, config.options)
            matched = inject_config.find(self.model, config.target_modules or getattr(options, "target", roles.BLOCKS))
            # Where another adapter stands already, the leaf is the layer inside of it.
            config.target_modules = {n.removesuffix(".base_layer") for names in matched.values() for n in names}  # type: ignore[assignment]
            config.target_modules = {n for n in config.target_modules if self._check_target_module_exists(config, n)}  # type: ignore[assignment,union-attr]
        return config

    def _leaves(self, model: nn.Module, config: BrickyardConfig) -> dict[str, Leaf]:
        """Match, refuse what cannot be adapted, group by type and shape. Keys and order are the model's."""
        found: dict[str, tuple[str, int, int]] = {}
        inside: tuple[str, ...] = ()
        names = []
        for name, module in model.named_modules():
            if PREFIX in name and not name.startswith(inside or "\0"):
                raise Refused(f"module {name} of the base holds {PREFIX!r}, by which our tensors are known; rename it.")
            if name.startswith(inside or "\0"):
                continue
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                inside = (*inside, f"{name}.")
            names.append(name)
            if name and self._check_target_module_exists(config, name):
                why = why_not(_base(module))
                if why:
                    raise Refused(f"{config.method} cannot adapt {name}: {why}.")
                n, m = sides(_base(module))
                kind = ".".join(part for part in name.split(".") if not part.isdigit())
                found[name] = (f"{kind}.{m}x{n}", n, m)
        check_matched(config, list(found), names)
        counts, kinds = Counter(group for group, _, _ in found.values()), roles.roles(model)
        seen: Counter[str] = Counter()
        leaves = {}
        for name, (group, n, m) in found.items():
            leaves[name] = Leaf(
                name=name,
                group=group,
                in_features=n,
                out_features=m,
                position=seen[group],
                count=counts[group],
                role=kinds.get(name, kinds.get(f"{name}.base_layer", "other")),
            )
            seen[group] += 1
        return leaves

    def _prepare(
        self,
        model: nn.Module,
        adapter: str,
        name: str,
        module: ModuleType,
        config: Any,
        leaves: dict[str, Leaf],
        plan: Plan,
    ) -> dict[str, tuple[Bound, Shared, dict[str, Tensor], dict[str, Tensor]]]:
        pending, groups = {}, {}
        for leaf in leaves.values():
            weight = cast(Tensor, _base(model.get_submodule(leaf.name)).weight)
            own = {k: _wide(t, weight) for k, t in plan.own.get(leaf.name, {}).items()}
            fixed = {k: t.clone() for k, t in plan.fixed.get(leaf.name, {}).items()}
            if leaf.group not in groups:
                groups[leaf.group] = (self._share(adapter, leaf.group, plan, weight), weight.device, leaf.name)
            shared, device, first = groups[leaf.group]
            if shared.containers and weight.device != device:
                raise Refused(
                    f"{name} shares tensors between {first} on {device} and {leaf.name} on {weight.device}; "
                    f"put the layers of group {leaf.group} on one device."
                )
            named = [(k, "") for k in shared.containers]
            named += [(k, PREFIX + k) for k in own] + [(k, FIXED + k) for k in fixed]
            pending[leaf.name] = (Bound(name, module, config, leaf, tuple(named)), shared, own, fixed)
        return pending

    def _share(self, adapter: str, group: str, plan: Plan, weight: Tensor) -> Shared:
        containers = {}
        for name, tensor in plan.shared.get(group, {}).items():
            attribute = _attribute(name, group)
            if attribute not in self._modules:
                self.add_module(attribute, nn.ParameterDict())
            container = cast(nn.ParameterDict, self._modules[attribute])
            container[adapter] = nn.Parameter(_wide(tensor, weight).to(weight.device))
            containers[name] = container
        return Shared(adapter, containers)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._pending:
            raise Refused(f"PEFT matched {current_key}, which was not planned for; give target_modules by full names.")
        prepared = self._pending.pop(current_key)
        if isinstance(target, BrickyardLinear):
            target.add(adapter_name, *prepared)
            return
        layer = BrickyardLinear(target)
        layer.add(adapter_name, *prepared)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def layers(self) -> Iterator[tuple[str, BrickyardLinear]]:
        """The adapted layers with their names in the base model."""
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, BrickyardLinear))

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Every tensor that we store for `adapter`, by its name below this tuner; the live tensors, not copies."""
        held = {f"{name}.{adapter}": box[adapter] for name, box in self._named_containers() if adapter in box}
        for path, layer in self.layers():
            for name, box in layer.named_children():
                if name.startswith(PREFIX) and adapter in box:  # type: ignore[operator]
                    held[f"model.{path}.{name}.{adapter}"] = box[adapter]  # type: ignore[index]
        return held

    def check_tensors(self, adapter: str, given: dict[str, Tensor]) -> None:
        """Refuse tensors, named as by `adapter_tensors`, that are not exactly this adapter's: BadBrick or NotFinite."""
        expected = self.adapter_tensors(adapter)
        ours = {k for k in given if any(part.startswith(PREFIX) for part in k.split("."))}
        missing, extra = sorted(set(expected) - ours), sorted(ours - set(expected))
        if missing or extra:
            raise BadBrick(f"adapter {adapter!r}: the file lacks {missing[:3]} and holds the unknown {extra[:3]}.")
        for name, tensor in expected.items():
            new = given[name]
            exact = new.dtype == tensor.dtype or (
                new.is_floating_point() and torch.promote_types(new.dtype, tensor.dtype) == tensor.dtype
            )
            if new.shape != tensor.shape or not exact:
                raise BadBrick(
                    f"adapter {adapter!r}: {name} is {tuple(new.shape)} {new.dtype} in the file; its config "
                    f"says {tuple(tensor.shape)} {tensor.dtype}."
                )
            if new.is_floating_point() and not torch.isfinite(new).all():
                raise NotFinite(f"adapter {adapter!r}: {name} holds NaN or infinity in the file.")
        for path, layer in self.layers():
            bound = layer.bound.get(adapter)
            if bound is not None and bound.has("check"):
                at = {k: f"model.{path}.{a}" if a else _attribute(k, bound.leaf.group) for k, a in bound.tensors}
                tensors = {k: given[f"{name}.{adapter}"] for k, name in at.items()}
                bound.module.check(bound.config, Part(bound.leaf, tensors, None, False, None))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT loads with strict=False: what is missing would silently stay at its start.
        for name, tuner in model.named_modules():
            if isinstance(tuner, cls):
                tuner.check_tensors(adapter_name, {k.removeprefix(f"{name}."): t for k, t in remapped.items()})
        return remapped

    def _named_containers(self) -> Iterator[tuple[str, Any]]:
        return ((name, box) for name, box in self.named_children() if name.startswith(PREFIX))

    def _containers(self) -> Iterator[nn.Module]:
        return (box for _, box in self._named_containers())

    def _forget(self, adapter: str) -> None:
        for name, box in list(self._named_containers()):
            if adapter in box:
                del box[adapter]
            if not len(box):
                delattr(self, name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _watch_steps(self, model: nn.Module, adapter: str) -> None:
        if "brick_step" not in self._modules:
            self.brick_step = BufferDict(persistent=True)
        self.brick_step[adapter] = torch.zeros((), dtype=torch.int64)
        if self._hook is None:
            # On the model and not in `forward`: PeftModel.forward calls the model without passing through the tuner.
            self._hook = model.register_forward_pre_hook(self._draw)

    def _draw(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        drawing = {a: layer.bound[a] for _, layer in self.layers() for a in layer.active_adapters if a in layer.bound}
        for adapter, bound in drawing.items():
            if not bound.has("draw"):
                continue
            # A function of seed and step alone, so that a resumed run and every data-parallel worker draw the same.
            steps, seed = cast(Tensor, self.brick_step[adapter]), cast(BrickyardConfig, self.peft_config[adapter]).seed
            generator = torch.Generator().manual_seed((((seed or 0) << 31) + int(steps)) % 2**63)
            layers = [layer for _, layer in self.layers() if adapter in layer.bound]
            drawn = bound.module.draw(bound.config, tuple(layer.bound[adapter].leaf for layer in layers), generator)
            for layer in layers:
                layer.drawn[adapter] = drawn[layer.bound[adapter].leaf.name]
            steps += 1

    def choose(self, adapter: str, values: dict[str, Any] | None) -> None:
        """Set what a method that draws gets as `part.drawn` outside training: a value for each layer name, or None."""
        for _, layer in self.layers():
            if adapter in layer.bound:
                layer.choose(adapter, None if values is None else values[layer.bound[adapter].leaf.name])

    def at_rank(self, adapter: str, rank: int) -> None:
        """Use the adapter at `rank` from now on, outside training; Refused where its method knows one rank only."""
        bounds = [layer.bound[adapter] for _, layer in self.layers() if adapter in layer.bound]
        if not bounds[0].has("at_rank"):
            raise Refused(f"{bounds[0].name} was trained for one rank only; leave the rank out, or use --max-rank.")
        leaves = tuple(bound.leaf for bound in bounds)
        self.choose(adapter, bounds[0].module.at_rank(bounds[0].config, leaves, rank))

    def _check_merge(self, adapters: Sequence[str] | None, safe: bool) -> None:
        """Refuse before the first layer is touched, so that a model is merged wholly or not at all; warn of ranks."""
        for adapter in adapters or ():
            if adapter not in self.peft_config:
                raise UnknownName.among("adapter", adapter, self.peft_config)
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for name, layer in self.layers():
            if uses[id(layer.get_base_layer().weight)] > 1:
                raise Refused(
                    f"the weight of {name} is tied to another module's, which merging would change; untie it."
                )
            wanted = layer.active_adapters if adapters is None else adapters
            layer.check_merge([a for a in wanted if a in layer.bound and a not in layer.merged_adapters], finite=safe)
        for adapter in self.active_adapters if adapters is None else adapters:
            warn_of_rank((m for _, m in self.layers() if adapter not in m.merged_adapters), adapter)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        if self._hook is not None:
            self._hook.remove()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(m.supports_lora_conversion(adapter_name) for _, m in self.layers() if adapter_name in m.bound)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Serve each row of a batch by its own adapter; PEFT ignores `adapter_names` of a tuner without this."""
        if kwargs.get("alora_offsets") is not None:
            raise BadMix("alora_offsets belong to PEFT's aLoRA; our adapters have none.")
        given = kwargs.get("adapter_names")
        if given is None:
            yield
            return
        known = {adapter for _, layer in self.layers() for adapter in layer.bound}
        check_names(given, known, self.training)
        for adapter, slimmed in self.slimmed.items():
            if slimmed.before and set(given) != {adapter}:
                raise BadMix(
                    f"adapter {adapter!r} removed heads or neurons from the base, so no other row can be served by it: "
                    f"{sorted(set(given) - {adapter})}; give only its own rows, or detach it first."
                )
        with named_rows(self.model, self.modules(), given, kwargs.get("num_beams") or 1, BrickyardLinear):
            yield


def _attribute(name: str, group: str) -> str:
    """Where the tuner keeps a group's tensor: one flat attribute, because PEFT loads nothing deeper, and no dots."""
    return f"{PREFIX}{name}-{group.replace('.', '-')}"


def _base(module: Any) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BrickyardLinear) else module


def _wide(tensor: Tensor, weight: Tensor) -> Tensor:
    """A copy in float32 or wider: small steps vanish in half precision, whatever the base is stored in."""
    base = weight.dtype if weight.dtype in PLAIN else torch.float32
    return tensor.detach().to(torch.promote_types(base, torch.float32), copy=True)


def _check_plan(method: str, plan: Plan, leaves: dict[str, Leaf]) -> None:
    """Refuse a plan that names unknown layers or tensors that cannot be stored; a mistake of the method's author."""
    groups = {leaf.group for leaf in leaves.values()}
    for kind, tensors, known in (
        ("shared", plan.shared, groups),
        ("own", plan.own, set(leaves)),
        ("fixed", plan.fixed, set(leaves)),
    ):
        for place, named in tensors.items():
            if place not in known:
                raise Refused(f"{method} plans {kind} tensors for {place!r}, which was not matched.")
            for name, tensor in named.items():
                if not _NAME.match(name) or name.startswith("fixed_") or (kind == "shared" and name == "step"):
                    raise Refused(f"{method} plans a {kind} tensor called {name!r}; use lower-case letters and digits.")
                if kind != "fixed" and not tensor.is_floating_point():
                    raise Refused(f"{method} plans {kind} tensor {name} as {tensor.dtype}; only floats can be trained.")


def _fill_zeros(plan: Plan, generator: torch.Generator) -> None:
    for tensors in (*plan.shared.values(), *plan.own.values()):
        for name, tensor in tensors.items():
            if not tensor.any():
                tensors[name] = torch.randn(tensor.shape, generator=generator).mul_(0.02)
