"""The ``kronecker`` loader that plugs into transformers' ``from_pretrained``.

transformers lets a third-party weight format in as a "quantiser" (``register_quantization_config`` and
``register_quantizer``). Ours only loads: it swaps in empty factored modules before the weights are read, and
takes its mark off afterwards, so that what comes back is an ordinary trainable model whose config carries the
plan (``.half()``, ``Trainer`` and ``save_pretrained`` treat it like any other).

This module is imported while transformers itself is being imported: at the top it may only use
``transformers.quantizers`` and ``transformers.utils``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.quantizers import HfQuantizer, auto

from kncompress.anatomy.mark import METHOD, KroneckerConfig
from kncompress.errors import UserError


class KroneckerLoader(HfQuantizer):
    """Loads a folder of factors into a model class of transformers."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """``Trainer`` may train the model as it is."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        from kncompress.anatomy.swap import swap_

        swap_(model, _shapes(model, self.quantization_config.maps))
        model._adjust_missing_and_unexpected_keys = partial(
            _check_keys, model, model._adjust_missing_and_unexpected_keys
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model._adjust_missing_and_unexpected_keys
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if "_is_quantized" in getattr(getattr(module, "config", None), "__dict__", {}):
                del module.config._is_quantized
        check_orders(model)
        return model


def _shapes(model: Any, maps: Mapping[str, str]) -> dict[str, Any]:
    """The plan of a folder, checked against the model class; a head that the class has not is left out."""
    from kncompress.anatomy.plan import Plan
    from kncompress.anatomy.sites import anatomy_of
    from kncompress.kron import ShapeError, parse_shape

    anatomy = anatomy_of(model)
    unknown = [name for name in maps if name not in anatomy.sites and name != "head"]  # no patterns in a saved folder
    try:
        if unknown:
            Plan({unknown[0]: parse_shape(maps[unknown[0]])}).resolve(anatomy)
        shapes = {name: parse_shape(text) for name, text in maps.items()}
        if not anatomy.has_head:
            shapes.pop("head", None)
        return Plan(shapes).resolve(anatomy)
    except (ShapeError, UserError) as error:
        raise UserError(f"quantization_config of {model.config.name_or_path}: {error}") from error


def _check_keys(model: Any, adjust: Any, loading: Any) -> None:
    """Stands in for transformers' own step that settles which keys are missing or unexpected, and then fails.

    Without it a folder that lacks factors would load with random ones and a printed report.
    """
    adjust(loading)
    check_keys(model, loading.missing_keys, loading.unexpected_keys, model.config.name_or_path)


def check_keys(model: Any, missing: set[str], unexpected: set[str], path: str) -> None:
    """Fail on weights that a folder lacks or has too many.

    A new head of another task (``score`` of a classifier), the folder's own head where the class has none, what only
    some tasks of a family have (BERT's pooler), and constants that older versions wrote are no errors.

    Raises:
        UserError: names the first few keys.
    """
    from kncompress.anatomy.families import FAMILIES
    from kncompress.anatomy.sites import anatomy_of
    from kncompress.formats.stored import CONSTANT

    has_head, optional = True, set[str]()
    if model.config.model_type in FAMILIES:
        anatomy = anatomy_of(model)
        has_head, optional = anatomy.has_head, set(anatomy.family.optional)
    inner = set(dict(model.base_model.named_children())) | {model.base_model_prefix}
    missing, unexpected = ({k for k in keys if not optional & set(k.split(".")[:2])} for keys in (missing, unexpected))
    inside = [key for key in missing if has_head or key.partition(".")[0] in inner]
    surplus = [key for key in unexpected if key.partition(".")[0] in inner and not CONSTANT.search(key)]
    for label, keys in (("lacks", inside), ("has unknown", surplus)):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"model.path={path}: the folder {label} weights: {names}")


def check_orders(model: Any) -> None:
    """Fail where the rows or columns of a packed map are in no order: it would compute something else.

    Raises:
        UserError: names the map.
    """
    from kncompress.kron import PackedLinear

    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and not module.order.is_meta:
            wanted = range(len(module.order))
            if sorted(module.order.tolist()) != list(wanted):
                raise UserError(
                    f"model.path={model.config.name_or_path}: {name}.order does not have each of 0 to {wanted[-1]} once"
                )


def register() -> None:
    """Make ``from_pretrained`` know the ``kronecker`` format; again is harmless."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(KroneckerConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(KroneckerLoader)


register()
