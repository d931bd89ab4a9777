"""LoRA by peft on a compressed model: ``target_modules`` may name factored maps as it may name dense ones.

peft lets a configuration carry LoRA layers for module classes that it does not know. Once this module is imported,
which ``import kncompress`` sees to when peft is, every ``LoraConfig`` carries ours, those that peft reads from an
adapter's folder too.

The adapter's update, ``scaling * B A``, is of low rank and stands beside the factors, which stay frozen. It cannot be
merged into them, but the dense twin (``to_dense``) takes the same adapter and merges it.

This module is imported while peft itself is still being imported: at the top it may use no more of it than
``peft.tuners.lora.config``.
"""

from functools import cache
from typing import Any

from peft.tuners.lora.config import LoraConfig
from torch import nn

INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weight as it is."""


@cache
def lora_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """{factored module: its LoRA layer}."""
    from peft.tuners.lora.layer import Linear

    from kncompress.anatomy.swap import FusedMaps
    from kncompress.kron import HybridLinear, KroneckerLinear, PackedLinear

    class LoraKronecker(Linear):
        """y = W x + bias + scaling B A x, with W a Kronecker sum, several, or the fused maps of one module."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fan_in_fan_out = False  # true in a configuration that names a Conv1D too

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], None]:
            return {(): None}

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
            if config.init_lora_weights not in INITS:
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights}: changes the base weight, which a factored map has "
                    f"not; one of {', '.join(map(str, INITS))}"
                )
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise ValueError(
                "a Kronecker sum cannot take up a LoRA update: load the adapter into the dense twin, "
                "kncompress.formats.pretrained.to_dense(model), and merge it there"
            )

    kinds = (KroneckerLinear, HybridLinear, PackedLinear, FusedMaps)
    _include_in_all_linear(kinds)
    return dict.fromkeys(kinds, LoraKronecker)


def _include_in_all_linear(kinds: tuple[type[nn.Module], ...]) -> None:
    """Have ``target_modules="all-linear"`` of a LoRA configuration name modules of these kinds too.

    A fused module gets one adapter, not one for each of its maps that stayed dense; the head gets none, as in peft.
    """
    from peft.tuners import tuners_utils

    of_peft = tuners_utils._maybe_include_all_linear_layers

    def with_factored(config: Any, model: Any) -> Any:
        wanted = isinstance(config, LoraConfig) and str(config.target_modules).lower() == "all-linear"
        config = of_peft(config, model)
        if wanted:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            named = {name: module for name, module in model.named_modules() if module is not head}
            ours = {name for name, module in named.items() if isinstance(module, kinds)}
            inner = {name for name in ours | config.target_modules if _within(name, ours)}
            config.target_modules = (config.target_modules | ours) - inner
        return config

    tuners_utils._maybe_include_all_linear_layers = with_factored


def _within(name: str, others: set[str]) -> bool:
    """Whether a module lies inside one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def _register() -> None:
    """Make each new ``LoraConfig`` carry the layers."""
    checks = LoraConfig.__post_init__

    def __post_init__(self: LoraConfig) -> None:
        checks(self)
        self._register_custom_module(lora_layers())

    LoraConfig.__post_init__ = __post_init__


_register()
