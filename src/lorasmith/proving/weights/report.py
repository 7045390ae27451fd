"""From the tallies to the record: precision, per-tensor table, first differences, grade."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorasmith.errors import CheckpointError
from lorasmith.files import digests
from lorasmith.proving.weights.blocks import BUCKETS, Tally
from lorasmith.proving.weights.check import Checked, check
from lorasmith.proving.weights.claims import RECORD, Claims, Identity
from lorasmith.proving.weights.formula import Expected
from lorasmith.proving.weights.model_folder import ProvenTensor, TensorFolder
from lorasmith.proving.weights.rounding import GRIDS
from lorasmith.records.base import Finding
from lorasmith.records.proof import Difference, TensorProof, WeightProof

DIFFERENCES = 100
"""How many the record lists; the table counts them all."""
PER_TENSOR = 5
BOUNDED_MOST = 16
"""Most ulps that a calibrated element may be away from exact: error feedback moves an element by a few ulps
of its row's larger ones, and a merge must limit it; a scale or a sign that is wrong goes far beyond."""

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATS = frozenset((*GRIDS, "F64"))


class Report:
    """Collects what the checks say of a merge."""

    def __init__(self, claims: Claims, merged: TensorFolder) -> None:
        self.claims = claims
        self.merged = merged
        self.findings: list[Finding] = list(merged.problems)
        self.tensors: list[TensorProof] = []
        self.differences: list[Difference] = []
        self.precision = "base"
        self._notes: dict[str, list[str]] = {}

    def match(
        self, expected: Mapping[str, Expected], elsewhere: Collection[str] = ()
    ) -> list[tuple[Expected, ProvenTensor]]:
        """Pair what should be with what is there, in the merged files' order; note what has no partner.

        Tensors that are checked `elsewhere` are passed over.
        """
        self.precision = self._precision(expected)
        for want in expected.values():
            self.claim(want)
        for name, want in expected.items():
            if name not in self.merged.tensors:
                self._whole(name, "missing", want.source.elements, "", "not in the merge")
        pairs = []
        for name, stored in self.merged.tensors.items():
            if name in elsewhere:
                continue
            want_or_none = expected.get(name)
            if want_or_none is None:
                self._whole(name, "extra", stored.elements, stored.dtype, "in neither base nor adapter")
            elif self._comparable(want_or_none, stored):
                if stored.elements:
                    pairs.append((want_or_none, stored))
                else:
                    self.take(Checked(want_or_none, stored, Tally()))
        return pairs

    def claim(self, want: Expected) -> None:
        """How a tensor with products was rounded, as the merge says; all others are never but to nearest."""
        if want.terms and self.claims.record is not None:
            want.rounding = self.claims.rounding_of(want.name)
            want.seed = self.claims.record.seed if want.rounding == "dithered" else None

    def _precision(self, expected: Mapping[str, Expected]) -> str:
        if self.claims.record:
            claimed = self.claims.record.precision
            if claimed not in ("base", *_NAMES):
                self.note("record-disagrees", f"unknown precision {claimed!r}", RECORD)
            return claimed
        pairs = [
            (want.dtype, self.merged.tensors[name].dtype)
            for name, want in expected.items()
            if name in self.merged.tensors and want.dtype in _FLOATS
        ]
        types = {merged for _, merged in pairs}
        if len(types) == 1 and any(base != merged for base, merged in pairs):
            return next((name for name, short in _NAMES.items() if short in types), "base")
        return "base"

    def _comparable(self, want: Expected, stored: ProvenTensor) -> bool:
        wanted = want.dtype if want.dtype not in _FLOATS else _NAMES.get(self.precision, want.dtype)
        if stored.shape != want.source.shape:
            self._whole(stored.name, want.kind, stored.elements, stored.dtype, f"shape {list(stored.shape)}")
            return False
        if stored.dtype != wanted:
            self.note("wrong-dtype", f"stored as {stored.dtype}, not {wanted}", stored.name)
        if stored.dtype == "F64" and want.kind == "merged":
            raise CheckpointError(
                f"the base stores {stored.name!r} as float64, whose rounding cannot be checked",
                where=want.source.file,
                remedy="merge with --precision float32",
            )
        both_float = want.source.dtype in _FLOATS and stored.dtype in GRIDS
        if both_float or (stored.dtype == want.source.dtype and want.kind != "merged"):
            return True
        self._whole(stored.name, want.kind, stored.elements, stored.dtype, f"stored as {stored.dtype}")
        return False

    def _whole(self, name: str, kind: str, elements: int, dtype: str, note: str) -> None:
        """A tensor whose elements cannot be compared is wrong as a whole."""
        self.tensors.append(
            TensorProof(
                name=name, kind=kind, elements=elements, wrong=elements, max_ulps=0, dtype=dtype, note=note
            )
        )
        self.note(f"{kind}-tensor" if kind in ("missing", "extra") else "wrong-tensor", note, name)

    def note(self, code: str, message: str, name: str) -> None:
        """An error that may hold for several tensors, which are told together."""
        self._notes.setdefault(f"{code}\n{message}", []).append(name)

    def take(self, checked: Checked, *, on_grid: bool = False, most: int = BOUNDED_MOST) -> None:
        """Enter a tensor whose elements were all compared, as floats or on the grid of a quantized weight.

        `most` is how many steps a calibrated element may be away.
        """
        want, stored, tally = checked.expected, checked.stored, checked.tally
        kind = "cast" if want.kind == "copied" and stored.dtype != want.source.dtype else want.kind
        bounded = tally.wrong == 0 or self._is_bounded(want, tally, most)
        note = "" if bounded else self._explain_codes(checked) if on_grid else self._explain(checked, kind)
        self.tensors.append(
            TensorProof(
                name=stored.name,
                kind=kind,
                elements=stored.elements,
                wrong=tally.wrong,
                max_ulps=tally.max_ulps,
                redone=tally.redone,
                dtype=stored.dtype,
                ulps=_table(tally),
                note=note,
                rounding=want.rounding,
            )
        )
        for wrong in tally.first[:PER_TENSOR]:
            if len(self.differences) < DIFFERENCES:
                index = _unflatten(stored.shape, wrong.row, wrong.column)
                self.differences.append(
                    Difference(
                        tensor=stored.name,
                        index=index,
                        found=wrong.found,
                        expected=wrong.expected,
                        ulps=wrong.ulps,
                    )
                )

    def _is_bounded(self, want: Expected, tally: Tally, most: int) -> bool:
        return want.rounding == "calibrated" and tally.max_ulps <= most

    def _explain_codes(self, checked: Checked) -> str:
        tally = checked.tally
        text = "codes of other grid points than the rounding rule gives"
        if tally.stale == tally.wrong:
            text = "codes of the base where the update moves the number to another grid point"
        self.note("wrong-codes", text, checked.stored.name)
        return text

    def _explain(self, checked: Checked, kind: str) -> str:
        """Tell an auditor what the tool seems to have done; also kept as a finding over all such tensors."""
        tally, stored = checked.tally, checked.stored
        if kind != "merged":
            code, text = "tensor-differs", "differs from what it should have been taken over from"
        elif tally.stale == tally.wrong and self._is_base(checked):
            code, text = "update-dropped", "holds the base's values: the update was dropped"
        elif tally.stale == tally.wrong and tally.max_ulps > 1:
            code, text = "update-partly-dropped", "a part holds the base's values"
        elif tally.near == tally.wrong:
            code, text = (
                "rounded-otherwise",
                "rounded otherwise: off by a few roundings at most",
            )
        else:
            code, text = "wrong-values", "wrong values"
            ratio = tally.moved / tally.wanted if tally.wanted > 0 else 0.0
            if abs(ratio) > 0.02 and abs(ratio - 1) > 0.02:
                self.note(code, text, stored.name)
                return f"{text}: the update looks applied {ratio:.3g} times"
        self.note(code, text, stored.name)
        return text

    def _is_base(self, checked: Checked) -> bool:
        want = checked.expected
        plain = Expected(want.name, want.dtype, want.source, replaced=want.replaced)
        return all(again.tally.wrong == 0 for again in check([(plain, checked.stored)]))

    def finish(self, identity: Identity, used: int, total: int) -> WeightProof:
        """Grade, and make the record."""
        for key, names in self._notes.items():
            code, message = key.split("\n", 1)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.findings.append(
                Finding(
                    severity="error", code=code, message=f"{len(names)} × {message}: {shown}", where=names[0]
                )
            )
        return WeightProof(
            grade=self._grade(),
            rounding=self.claims.rounding,
            precision=self.precision,
            claimed=self.claims.record is not None,
            bound_ulps=max((tensor.max_ulps for tensor in self.tensors), default=0),
            base_sha256=identity.base,
            adapter_sha256=identity.adapters,
            merged_sha256=digests.combine(identity.merged),
            tensors_checked=len(self.tensors),
            elements_checked=sum(tensor.elements for tensor in self.tensors),
            adapter_tensors_used=used,
            adapter_tensors_total=total,
            tensors=sorted(self.tensors, key=lambda tensor: tensor.name),
            differences=self.differences,
            findings=self.findings,
        )

    def _grade(self) -> str:
        if any(finding.severity == "error" for finding in self.findings):
            return "different"
        if any(tensor.wrong for tensor in self.tensors):
            return "bounded" if self.claims.rounding == "calibrated" else "different"
        return "bounded" if self.claims.rounding == "calibrated" else "exact"


def _table(tally: Tally) -> dict[str, int]:
    table = {}
    for low, end in zip(BUCKETS, (*BUCKETS[1:], None), strict=True):
        if low in tally.buckets:
            label = f"{low}-" if end is None else str(low) if end == low + 1 else f"{low}-{end - 1}"
            table[label] = tally.buckets[low]
    return table


def _unflatten(shape: tuple[int, ...], row: int, column: int) -> list[int]:
    """The element's index in the tensor's own shape, from its place in the matrix."""
    if not shape:
        return []
    if len(shape) == 1:
        return [row]
    index = [column]
    for size in reversed(shape[1:-1]):
        row, rest = divmod(row, size)
        index.insert(0, rest)
    return [row, *index]
