"""The Lightning strategy of ``trainer.strategy=fsdp``: modules that shard themselves, checkpoints as of one process."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.optim import Optimizer

from kncompress.training.checkpoints import read_checkpoint
from kncompress.training.optimization import OptimizerPair
from kncompress.training.ranks import Watched
from kncompress.training.sharding import gathered, scattered, scattered_state


class ShardedStrategy(Watched, ModelParallelStrategy):  # type: ignore[misc]
    """FSDP2 over all processes; the module cuts its models in ``configure_model``.

    A checkpoint is the one file that a single process writes, with whole tensors, put together on the first process one
    after the other. So any number of processes goes on from it, by any strategy, and it is read as every checkpoint is:
    checksums, and nothing unpickled, which a distributed checkpoint's index would have to be. Lightning's own way to
    one file knows no optimiser that consists of two.
    """

    def __init__(self, processes: int) -> None:
        """Args: ``processes``: on all machines together."""
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimisers' state over."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the first process; those that the module leaves out of checkpoints are not gathered."""
        module: Any = self.lightning_module
        state = {key: value for key, value in module.state_dict(keep_vars=True).items() if module.is_saved(key)}
        return dict(gathered(state, self.is_global_zero))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its pieces."""
        assert self.lightning_module is not None
        like = self.lightning_module.state_dict(keep_vars=True)
        state = {key: scattered(value, like.get(key)) for key, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors, on the first process."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return dict(gathered(inner.state_dict(), self.is_global_zero))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its pieces."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if isinstance(optimizer, OptimizerPair):
                parts = zip(optimizer.parts, state["parts"], strict=True)
                optimizer.load_state_dict({"parts": [scattered_state(part, each) for part, each in parts]})
            else:
                optimizer.load_state_dict(scattered_state(optimizer, state))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """One file, by the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Its tensors stay in the file until they are used: the processes of a machine share its pages."""
        return read_checkpoint(checkpoint_path, mapped=True)
