"""What training minimises, and with which optimiser: ``train`` and ``glue``."""

from dataclasses import dataclass

from kncompress.config.checks import check_choices, check_not_negative, check_positive, check_share, choice
from kncompress.errors import UserError


@dataclass
class ObjectiveConfig:
    """Weights of the training loss; 0 leaves a term out. All terms are means, logits in nats per token."""

    embedding: float = 0.0
    """MSE of the embedding outputs."""
    attention: float = 0.0
    """Attention of every layer: KL(teacher || student) of the maps, or MSE of the scores."""
    attention_form: str = choice("kl", "kl", "mse")
    """``kl`` (KnGPT2) or ``mse`` (KroneckerBERT: pre-softmax scores)."""
    hidden: float = 0.0
    """MSE of the hidden states after every layer."""
    feed_forward: float = 0.0
    """MSE of the feed-forward outputs of every layer."""
    logits: float = 0.0
    """KL(teacher || student) of the next-token distributions, times temperature squared."""
    temperature: float = 1.0
    """Softmax temperature of the logits term."""
    cross_entropy: float = 1.0
    """Next-token cross-entropy on the text."""
    cache: str | None = None
    """``train``: folder of tokens that are drawn from the teacher once, and stand for its logits in every later run:
    unbiased, and the teacher need not run (arXiv 2503.16870). Null: its logits."""
    samples: int = 12
    """Tokens that ``cache`` draws from each distribution."""

    TERMS = ("embedding", "attention", "hidden", "feed_forward", "logits", "cross_entropy")

    def __post_init__(self) -> None:
        for name in self.TERMS:
            check_not_negative(f"objective.{name}", getattr(self, name))
        if not any(getattr(self, name) for name in self.TERMS):
            raise UserError(f"objective: every weight is 0; give at least one of {', '.join(self.TERMS)}")
        check_choices(self, "objective.")
        check_positive("objective.temperature", self.temperature)
        check_positive("objective.samples", self.samples)
        if self.cache is not None:
            self._check_cache()

    def _check_cache(self) -> None:
        if not self.logits:
            raise UserError(f"objective.cache={self.cache}: stands for the teacher's logits; objective.logits is 0")
        for name in ("embedding", "attention", "hidden", "feed_forward"):
            if getattr(self, name):
                told = f"objective.{name}={getattr(self, name):g} needs the teacher itself; give objective=logits"
                raise UserError(f"objective.cache={self.cache}: keeps its logits alone, and {told}")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(getattr(self, name) for name in self.TERMS if name != "cross_entropy")


@dataclass
class OptimizerConfig:
    """The optimiser and its schedule: linear warm-up, then cosine."""

    name: str = choice("adamw", "adamw", "muon")
    """``adamw``, or ``muon``: Muon (its step scaled to the size of AdamW's) for the dense matrices inside the
    layers, AdamW for everything else."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """On matrices; norms, biases and embeddings are exempt."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    final: float = 0.1
    """Rate at the end as a share of the peak."""
    factor_rates: str = choice("one", "one", "scaled")
    """``one``: every factor takes ``lr``; ``scaled``: each takes the rate at which a step moves its map's weight as
    ``lr`` would move a dense one (``kron.gauge.factor_rates``)."""

    def __post_init__(self) -> None:
        check_choices(self, "optimizer.")
        check_positive("optimizer.lr", self.lr)
        check_not_negative("optimizer.weight_decay", self.weight_decay)
        for name in ("beta1", "beta2", "warmup", "final"):
            check_share(f"optimizer.{name}", getattr(self, name))
