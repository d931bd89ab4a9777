"""Kronecker sums in a turned residual stream against packed low rank: many fits of one model, a row of FILE each.

Usage: python experiments/rotations/study.py mini|smollm2 FILE [MOMENTS [EVERY]]

Rows that FILE holds are not made again. MOMENTS: folder that keeps the moments of the maps. EVERY: every n-th
layer alone, without perplexity.
"""

import copy
import csv
import sys
import time
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kncompress.anatomy.sites import Site, anatomy_of
from kncompress.anatomy.swap import dense_bias, dense_weight, module_at, set_bias_, set_weight_
from kncompress.compression.compress import unique_parameters
from kncompress.compression.dense_walk import moments, output_moments
from kncompress.compression.moments import input_of
from kncompress.compression.text import calibration_text
from kncompress.config import CalibrationConfig, DataConfig, ModelConfig
from kncompress.data.tokens import token_stream
from kncompress.evaluation import perplexity
from kncompress.kron import (
    Factors,
    KroneckerShape,
    Moment,
    PackedShape,
    PreparedMoment,
    Shape,
    kronecker_weight,
    nearest_factors,
    prepare_outputs,
    two_sided_factors,
)
from kncompress.kron.two_sided import _Problem
from kncompress.training.student import load_teacher

NORMS = {"gpt2": ("ln_1", "ln_2"), "llama": ("input_layernorm", "post_attention_layernorm")}
"""Norms before a layer's attention and before its feed-forward part."""
TOKENS = 6000
"""Tokens of each text that are scored."""
Q_STEPS = 6
"""Steps of the turns between two fits of the factors."""


@dataclass
class Map:
    """One map of a model, and what its errors are weighed by."""

    site: Site
    weight: Tensor
    bias: Tensor | None
    inputs: PreparedMoment
    outputs: PreparedMoment

    @property
    def reads(self) -> bool:
        """Whether it reads the residual stream; else it writes to it."""
        return not (self.site.mirrored or self.site.group == "o")

    def loss(self, weight: Tensor) -> float:
        """tr(G D C D^T), neither moment ridged."""
        d = self.weight - weight
        return float(((self.outputs.plain @ d @ self.inputs.plain) * d).sum(dtype=torch.float64))


@dataclass
class Turn:
    """Orthogonal matrices: of the stream, (D, D), and of the values of each layer, (layers, heads, d, d)."""

    stream: Tensor
    values: Tensor

    def rows(self, of: Map) -> Tensor | None:
        """U (M, M) of a map W -> U^T W V; None for the identity."""
        if not of.reads:
            return self.stream
        return self._heads(of.site, 1) if of.site.kind == "attn.v" else None

    def columns(self, of: Map) -> Tensor | None:
        """V (N, N)."""
        if of.reads:
            return self.stream
        if of.site.kind != "attn.o":
            return None
        return self._heads(of.site, of.site.in_features // (self.values.shape[1] * self.values.shape[2]))

    def _heads(self, site: Site, times: int) -> Tensor:
        assert site.layer is not None
        return torch.block_diag(*self.values[site.layer].repeat_interleave(times, 0))

    def apply(self, of: Map) -> Map:
        """The map in the turned coordinates."""
        u, v = self.rows(of), self.columns(of)
        weight = of.weight if v is None else of.weight @ v
        return Map(
            of.site,
            weight if u is None else u.T @ weight,
            of.bias,
            of.inputs if v is None else turned(of.inputs, v),
            of.outputs if u is None else turned(of.outputs, u),
        )

    def undo(self, of: Map, weight: Tensor) -> Tensor:
        """A weight in the turned coordinates -> in the model's own."""
        u, v = self.rows(of), self.columns(of)
        weight = weight if v is None else weight @ v.T
        return weight if u is None else u @ weight


def turned(moment: PreparedMoment, by: Tensor) -> PreparedMoment:
    """The moment of V^T x, with the same ridge."""
    old, exact = moment.moment, by.double()
    second = (exact.T @ old.second.double() @ exact).to(old.second)
    mean = (exact.T @ old.mean.double()).to(old.mean)
    return PreparedMoment(Moment(second, mean, old.count), moment.centred, moment.ridge)


def norm_of(model: Any, site: Site) -> torch.nn.Module:
    """The norm before a map that reads the stream."""
    family = anatomy_of(model).family
    layer = model.base_model.get_submodule(f"{family.layers}.{site.layer}")
    norm: torch.nn.Module = getattr(layer, NORMS[family.model_type][site.group == "mlp"])
    return norm


@torch.no_grad()
def folded(model: Any) -> Any:
    """A copy that computes the same, whose norms before the maps have gains of 1 and no biases. What LayerNorms would
    centre is written centred."""
    model = copy.deepcopy(model)
    readers = []
    for site in anatomy_of(model).sites.values():
        if site.layer is None:
            continue
        module, norm = module_at(model, site), norm_of(model, site)
        weight, bias = dense_weight(module, site).double(), dense_bias(module, site)
        if site.mirrored or site.group == "o":
            if isinstance(norm, torch.nn.LayerNorm):
                set_weight_(module, site, weight - weight.mean(0))
                set_bias_(module, site, bias - bias.mean())
            continue
        readers.append(norm)
        if isinstance(norm, torch.nn.LayerNorm):
            set_bias_(module, site, bias.double() + weight @ norm.bias.double())
        set_weight_(module, site, weight * norm.weight.double())
    for norm in readers:
        norm.weight.fill_(1.0)
        if isinstance(norm, torch.nn.LayerNorm):
            norm.bias.zero_()
    return model


@torch.no_grad()
def maps_of(model: Any, text: Any, every: int) -> list[Map]:
    """The maps within every n-th layer, with their moments on ``text``."""
    sites = [site for site in anatomy_of(model).sites.values() if site.layer is not None and site.layer % every == 0]
    outputs = output_moments(model, text, [site.name for site in sites])
    inputs: dict[str, PreparedMoment] = {}
    for name, moment in moments(model, text, list(dict.fromkeys(map(input_of, sites)))):
        site = next(site for site in sites if input_of(site) == name)
        inputs[name] = PreparedMoment(moment, centred=dense_bias(module_at(model, site), site) is not None)
    return [
        Map(
            site,
            dense_weight(module_at(model, site), site).clone(),
            dense_bias(module_at(model, site), site),
            inputs[input_of(site)],
            prepare_outputs(outputs[site.name].second, outputs[site.name].count),
        )
        for site in sites
    ]


@torch.no_grad()
def folded_maps(plain: list[Map], model: Any, fold: Any) -> list[Map]:
    """``plain``, of ``model``, as they are in ``fold``: with what its norms give for inputs."""
    known: dict[str, PreparedMoment] = {}
    found = []
    for of in plain:
        module, name = module_at(fold, of.site), input_of(of.site)
        if of.reads and name not in known:
            norm, old = norm_of(model, of.site), of.inputs.moment
            gain = norm.weight.double()
            shift = getattr(norm, "bias", None)
            shift = torch.zeros_like(gain) if shift is None else shift.double()
            mean = old.mean.double()
            second = old.second.double() - torch.outer(mean, shift) - torch.outer(shift, mean - shift)
            moment = Moment((second / gain[:, None] / gain).float(), ((mean - shift) / gain).float(), old.count)
            known[name] = PreparedMoment(moment, of.inputs.centred)
        inputs = known[name] if of.reads else of.inputs
        found.append(
            Map(of.site, dense_weight(module, of.site).clone(), dense_bias(module, of.site), inputs, of.outputs)
        )
    return found


def shape_of(of: Map, family: str, numbers: float) -> Shape:
    """The shape of ``family`` with the most terms in that many numbers: ``low``, ``packed``, ``s16`` (16 neighbours of
    the stream alone) or ``k4`` (right factors of 4x4)."""
    m, n = of.weight.shape
    if family == "low":
        return KroneckerShape((m, 1), (1, n), int(numbers / (m + n)))
    if family == "packed":
        return PackedShape.of_rank(m, n, max(r for r in range(1, min(m, n)) if r * (m + n - r) <= numbers))
    side = int(family[1:])
    right = (side, side) if family[0] == "k" else (1, side) if of.reads else (side, 1)
    one = KroneckerShape.fit(m, n, right)
    most = min(one.left[0] * one.left[1], one.right[0] * one.right[1])
    return KroneckerShape.fit(m, n, right, min(most, int(numbers / one.parameters)))


def strided(basis: Tensor, side: int) -> Tensor:
    """Columns, the most important ones first, such that those of equal weight differ in the left factor's index: the
    right factors then tell important ones from others."""
    size = len(basis)
    return basis.view(size, side, size // side).transpose(1, 2).reshape(size, size)


def eigenvectors(maps: list[Map]) -> Tensor:
    """(D, D), largest first: of the mean over the maps of C (readers) and G (writers), each of trace 1."""
    metrics = [(of.inputs if of.reads else of.outputs).matrix for of in maps]
    return torch.linalg.eigh(sum(matrix / matrix.trace() for matrix in metrics)).eigenvectors.flip(1).float()


class Learner:
    """Finds turns and factors in turned coordinates by descent on the sum of tr(G D C D^T), both moments ridged."""

    def __init__(self, maps: list[Map], total: float) -> None:
        self.maps, self.total = maps, total
        self.metrics = [(of.inputs.matrix.float(), of.outputs.matrix.float()) for of in maps]

    def turn(self, turn: Turn, factors: list[Factors]) -> Turn:
        """Another turn, for these factors: L-BFGS over Cayley transforms, scaled by the curvature of each plane."""
        scale = self._curvature(turn).rsqrt()
        z = torch.zeros_like(turn.stream).requires_grad_()
        b = torch.zeros_like(turn.values).requires_grad_()
        formed = [kronecker_weight(*some) for some in factors]
        optimizer = torch.optim.LBFGS([z, b], max_iter=Q_STEPS, max_eval=2 * Q_STEPS, line_search_fn="strong_wolfe")

        def moved() -> Turn:
            return Turn(turn.stream @ cayley(z * scale), turn.values @ cayley(b))

        def closure() -> Tensor:
            optimizer.zero_grad()
            now = moved()
            leaf = Turn(now.stream.detach().requires_grad_(), now.values.detach().requires_grad_())
            loss = 0.0
            for of, (c, g), weight in zip(self.maps, self.metrics, formed, strict=True):
                back = leaf.undo(of, weight)
                with torch.no_grad():
                    rest = back.detach() - of.weight
                    slope = g @ rest @ c
                    loss += float((slope * rest).sum(dtype=torch.float64))
                back.backward(2 * slope / self.total)
            torch.autograd.backward([now.stream, now.values], [leaf.stream.grad, leaf.values.grad])
            return torch.tensor(loss / self.total, dtype=torch.float64)

        optimizer.step(closure)
        with torch.no_grad():
            return moved()

    def _curvature(self, turn: Turn) -> Tensor:
        """(D, D): about how much the loss feels a turn in the plane of two coordinates."""
        found = torch.zeros_like(turn.stream)
        for of, (c, g) in zip(self.maps, self.metrics, strict=True):
            if of.reads:
                held = (turn.stream * (of.weight.T @ g @ of.weight @ turn.stream)).sum(0)
                seen = (turn.stream * (c @ turn.stream)).sum(0)
            else:
                held = (turn.stream * (of.weight @ c @ of.weight.T @ turn.stream)).sum(0)
                seen = (turn.stream * (g @ turn.stream)).sum(0)
            found += torch.outer(held, seen) + torch.outer(seen, held)
        return found / self.total

    def fit(self, turn: Turn, factors: list[Factors]) -> list[Factors]:
        """Other factors, for this turn: a half step of each side of the product's descent."""
        found = []
        for of, (left, right) in zip(self.maps, factors, strict=True):
            there = turn.apply(of)
            shape = KroneckerShape(left.shape[1:], right.shape[1:], len(left))
            problem = _Problem(there.weight, shape, there.inputs, there.outputs)
            for side in ("left", "right"):
                left, right = problem.step(left, right, side)
            found.append(Factors(left, right))
        return found


def cayley(a: Tensor) -> Tensor:
    """The orthogonal matrices (I + S)^-1 (I - S) of the skew ones S = a - a^T."""
    skew = a - a.mT
    eye = torch.eye(skew.shape[-1]).expand_as(skew)
    return torch.linalg.solve(eye + skew, eye - skew)


COLUMNS = ("model", "ratio", "family", "turn", "fit", "parameters", "share", "loss", "own", "other", "cpu_seconds")


class Study:
    """One model, its texts, and the file of its rows."""

    def __init__(self, name: str, file: Path, kept: str | None, every: int) -> None:
        root = Path(environ["KNCOMPRESS_DATA"])
        self.file, self.small = file, name == "mini"
        self.name = name if every == 1 else f"{name}/{every}"
        config = ModelConfig(**yaml.safe_load((Path(__file__).parents[2] / f"conf/model/{name}.yaml").read_text()))
        self.model, self.tokenizer = load_teacher(config)
        data = DataConfig(source="sample" if self.small else str(root / "wikitext2/wiki.train.tokens"))
        calibration = CalibrationConfig(tokens=16384 if self.small else 12288, context=512, moments=kept)
        text = calibration_text(data, calibration, self.model.config, self.tokenizer)
        self.fold = folded(self.model)
        self.every = every
        self.plain = maps_of(self.model, text, every)
        self.maps = folded_maps(self.plain, self.model, self.fold)
        self.total = sum(of.loss(torch.zeros_like(of.weight)) for of in self.maps)
        if every == 1:
            self.streams = [token_stream(some, split, self.tokenizer) for some, split in self.texts(name)]
        self.learner = Learner(self.maps, self.total)
        self.whole = unique_parameters(self.model)
        self.dense = every * sum(of.weight.numel() for of in self.maps)
        self.width = self.maps[0].weight.shape[1]

    @staticmethod
    def texts(name: str) -> list[tuple[DataConfig, str]]:
        """The two texts that are scored, and the split of each."""
        root = Path(environ["KNCOMPRESS_DATA"])
        if name == "mini":
            return [(DataConfig(), "test"), (DataConfig(source=str(root / "text/exl2_wiki.txt")), "all")]
        raw = DataConfig(source=str(root / "wikitext2/wiki.test.raw"), text_format="lines")
        return [(raw, "all"), (DataConfig(source=str(root / "text/digitalgov_cc0.txt")), "all")]

    def numbers(self, of: Map, ratio: float, turn: bool) -> float:
        """What a map may have: the same share of every map, so that the whole model has ``ratio`` fewer numbers."""
        left = self.dense - ratio * self.whole - (self.width**2 if turn else 0)
        return left / self.dense * of.weight.numel()

    def done(self, *key: object) -> bool:
        """Whether the file has this row."""
        if not self.file.exists():
            return False
        with self.file.open() as stream:
            return any(row[:5] == [self.name, *map(str, key)] for row in csv.reader(stream))

    def write(
        self, key: tuple[object, ...], numbers: int, loss: float, weights: list[Tensor], fold: bool, cpu: float
    ) -> None:
        """Score the model with ``weights`` in the place of the maps', and append the row."""
        scores = [""] * 2
        if self.every == 1:
            model = copy.deepcopy(self.fold if fold else self.model)
            for of, weight in zip(self.maps if fold else self.plain, weights, strict=True):
                module = module_at(model, of.site)
                set_weight_(module, of.site, weight)
                if of.bias is not None:
                    set_bias_(module, of.site, of.bias + (of.weight - weight) @ of.inputs.moment.mean)
            found = [perplexity(model, s.tokens, 512, limit=TOKENS, first=s.first) for s in self.streams]
            scores = [f"{some.perplexity:.2f}" for some in found]
        new = not self.file.exists()
        with self.file.open("a", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            if new:
                table.writerow(COLUMNS)
            row = (
                self.name,
                *key,
                numbers,
                f"{numbers / self.whole:.4f}",
                f"{loss:.6f}",
                *scores,
                f"{cpu:.0f}",
            )
            table.writerow(row)
        print(*row, flush=True)

    def low_rank(self, ratio: float, family: str, like: str | None = None) -> None:
        """Low rank, packed or not, fitted by both sides to the model as it is; in the numbers of the turned Kronecker
        sums of the family ``like``, without their turn's."""
        key = (ratio, f"{family} as {like}" if like else family, "none", "both")
        if self.done(*key):
            return
        began = time.process_time()
        numbers = [self.numbers(of, ratio, like is not None) for of in self.plain]
        if like is not None:
            pairs = zip(self.plain, numbers, strict=True)
            numbers = [shape_of(of, like, most).parameters for of, most in pairs]
        shapes = [shape_of(of, family, most) for of, most in zip(self.plain, numbers, strict=True)]
        fits = [
            two_sided_factors(of.weight, shape.sums[0], of.inputs, of.outputs)
            for of, shape in zip(self.plain, shapes, strict=True)
        ]
        self._finish(key, self.plain, shapes, fits, None, began)

    def _finish(
        self,
        key: tuple[object, ...],
        maps: list[Map],
        shapes: list[Any],
        fits: list[Factors],
        turn: Turn | None,
        began: float,
    ) -> None:
        weights = [kronecker_weight(*fit) for fit in fits]
        if turn is not None:
            weights = [turn.undo(of, weight) for of, weight in zip(maps, weights, strict=True)]
        loss = sum(of.loss(weight) for of, weight in zip(maps, weights, strict=True)) / self.total
        numbers = self.whole - self.dense + self.every * sum(shape.parameters for shape in shapes)
        numbers += 0 if turn is None else self.width**2
        self.write(key, numbers, loss, weights, maps is self.maps, time.process_time() - began)

    def sums(self, ratio: float, family: str, fit: str) -> None:
        """Kronecker sums in the model's own coordinates."""
        key = (ratio, family, "none", fit)
        if self.done(*key):
            return
        began = time.process_time()
        shapes = [shape_of(of, family, self.numbers(of, ratio, False)) for of in self.plain]
        fits = [
            nearest_factors(of.weight, shape) if fit == "nearest" else self.both(of, shape)
            for of, shape in zip(self.plain, shapes, strict=True)
        ]
        self._finish(key, self.plain, shapes, fits, None, began)

    @staticmethod
    def both(of: Map, shape: Any) -> Factors:
        """The product's two-sided fit."""
        return two_sided_factors(of.weight, shape, of.inputs, of.outputs, sweeps=4)

    def start(self, name: str, family: str) -> Turn:
        """The identity, a random turn, or the eigenvectors, strided for the family."""
        head, heads = anatomy_of(self.model).family.sizes(self.model.config)["head"], self.maps[2].weight.shape[0]
        layers = anatomy_of(self.model).layers
        values = torch.eye(head).expand(layers, heads // head, head, head).clone()
        if name == "identity":
            return Turn(torch.eye(self.width), values)
        if name == "random":
            noise = torch.randn(self.width, self.width, generator=torch.Generator().manual_seed(0))
            return Turn(torch.linalg.qr(noise).Q, values)
        basis = eigenvectors(self.maps)
        return Turn(basis if name == "eigen" else strided(basis, int(family[1:])), values)

    def turned_sums(self, ratio: float, family: str, start: str, rounds: int = 0) -> None:
        """Kronecker sums in turned coordinates: at the start, and after ``rounds`` of the turns and the factors."""
        keys = [(ratio, family, start, "both"), *([(ratio, family, f"{start}+learnt", "both")] if rounds else [])]
        if all(self.done(*key) for key in keys):
            return
        began = time.process_time()
        turn = self.start(start, family)
        shapes = [shape_of(of, family, self.numbers(of, ratio, True)) for of in self.maps]
        fits = [self.both(turn.apply(of), shape) for of, shape in zip(self.maps, shapes, strict=True)]
        if not self.done(*keys[0]):
            self._finish(keys[0], self.maps, shapes, fits, turn, began)
        if not rounds:
            return
        for _ in range(rounds):
            turn = self.learner.turn(turn, fits)
            fits = self.learner.fit(turn, fits)
            print(f"  {self.loss(turn, fits):.6f}", flush=True)
        last = [self.both(turn.apply(of), shape) for of, shape in zip(self.maps, shapes, strict=True)]
        fits = min(fits, last, key=lambda some: self.loss(turn, some))
        self._finish(keys[1], self.maps, shapes, fits, turn, began)

    def loss(self, turn: Turn, fits: list[Factors]) -> float:
        """Sum of tr(G D C D^T) over the maps, as a share of that of null maps."""
        pairs = zip(self.maps, fits, strict=True)
        return sum(of.loss(turn.undo(of, kronecker_weight(*fit))) for of, fit in pairs) / self.total


def mini(study: Study) -> None:
    """All that a small model allows."""
    for ratio in (0.33, 0.1, 0.2):
        study.low_rank(ratio, "packed")
        study.turned_sums(ratio, "k4", "strided")
    for start in ("random", "identity", "eigen"):
        study.turned_sums(0.2, "k4", start)
    for ratio in (0.33, 0.1, 0.2):
        study.turned_sums(ratio, "k4", "strided", rounds=6)
        study.sums(ratio, "k4", "both")
        study.low_rank(ratio, "low")
        study.low_rank(ratio, "packed", "k4")
        study.sums(ratio, "k4", "nearest")
        study.turned_sums(ratio, "s16", "strided", rounds=6)
    for ratio in (0.33, 0.1, 0.2):
        study.turned_sums(ratio, "k8", "strided")


def smollm2(study: Study) -> None:
    """What two cores allow, the most telling first."""
    for ratio in (0.1, 0.2, 0.33):
        study.low_rank(ratio, "packed")
        study.turned_sums(ratio, "s16", "strided")
    for ratio in (0.1, 0.2, 0.33):
        study.turned_sums(ratio, "k4", "strided")


MODELS = {"mini": mini, "smollm2": smollm2}


def main(name: str, file: str, kept: str | None = None, every: str = "1") -> None:
    """Make the rows of a model."""
    torch.set_num_threads(1)
    study = Study(name, Path(file), kept, int(every))
    if not study.done(0.0, "dense", "none", ""):
        study.write((0.0, "dense", "none", ""), study.whole, 0.0, [of.weight for of in study.maps], True, 0.0)
    MODELS[name](study)


if __name__ == "__main__":
    main(*sys.argv[1:])
