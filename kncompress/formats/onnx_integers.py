"""Weights of ONNX files as integers."""

from pathlib import Path
from tempfile import TemporaryDirectory

from kncompress.formats.onnx_passes import quiet, save, weight_bytes


def write_int8(source: Path, file: Path) -> None:
    """Write the ONNX file ``source`` to ``file`` with the weights of its maps and tables as 8-bit integers.

    Each output of a map has a scale of its own; inputs are turned to integers as they come (dynamic quantisation).
    """
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxscript.optimizer import fold_constants

    model = onnx_ir.load(source)
    large = weight_bytes(model) > 3 << 29
    with quiet(), TemporaryDirectory(dir=file.parent) as folder:
        # The quantiser takes a factor for a weight only where it meets the product as it is, not reshaped on the way.
        fold_constants(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
        RemoveUnusedNodesPass()(model)
        DeduplicateInitializersPass(size_limit=1 << 40)(model)
        folded = Path(folder) / "folded.onnx"
        save(model, folded)
        quantize_dynamic(folded, file, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large)
