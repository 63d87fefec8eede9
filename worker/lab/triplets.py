"""A site's training studies: pre-contrast, low-dose and standard-dose T1 of the same head, as training blocks.

Hides the layout, one folder per study with the subfolders `pre`, `low` and `standard` that hold one series each, and
which studies are usable. They are read, paired, prepared and judged as a hospital's study is. Must never drop a study
without a named reason, or train on a truth whose own header says that it is not the standard dose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.agents import BY_NAME
from models.brain import NoBrainError
from models.preprocess import Prepared, prepare
from models.quality import judge_pair, refused
from models.registration import RegistrationError
from models.simulation.samples import Block
from models.training.site import TripletError, make_block
from service.core.dicom.site_rules import Protocol
from service.core.errors import Permanent, Reason
from worker.choose.acquisition import Acquisition, check_acquisition, read_acquisition
from worker.choose.pairing import Pair, choose_pair
from worker.pipeline import GATES
from worker.read.contrast import STANDARD_DOSE_FRACTION
from worker.read.study import Series, Study, find_files, plain, read_study

ROLES = ("pre", "low", "standard")
HIGHEST_FRACTION = 1.5  # of the standard dose, that a standard-dose series may state


@dataclass(frozen=True)
class Triplets:
    """The usable studies, and why the others are not."""

    patients: dict[str, list[Block]]  # who it is, to the usable studies
    refused: tuple[tuple[str, Permanent], ...]  # name of the folder, reason


def read_triplets(folder: Path, say: Callable[[str], None], protocols: Sequence[Protocol] = ()) -> Triplets:
    """Read every study folder of `folder`, by name.

    Args:
        folder: one folder per study, see `read_triplet`.
        say: told one line per study, used or refused.
        protocols: the site's rules, as at inference; of the low-dose pair alone.
    """
    patients: dict[str, list[Block]] = {}
    refused: list[tuple[str, Permanent]] = []
    for study in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            patient, block = read_triplet(study, protocols)
            patients.setdefault(patient, []).append(block)
            say(f"{study.name}: used")
        except Permanent as error:
            refused.append((study.name, error))
            say(f"{study.name}: refused, {error.reason.name}: {error.detail or error.reason.text}")
    return Triplets(patients, tuple(refused))


def read_triplet(folder: Path, protocols: Sequence[Protocol] = ()) -> tuple[str, Block]:
    """One study as a training block, and whose it is.

    Args:
        folder: with the subfolders `pre`, `low` and `standard`, all of one study of one patient.
        protocols: the site's rules.

    Returns:
        ID of the patient, whoever issued it (two patients of one ID then count as one, which mixes nothing), or the
        name of the folder where there is none; the block.

    Raises:
        Permanent: as `worker.pipeline.run` does for the pair and its likeness; AMBIGUOUS_SERIES when a subfolder holds
            other than one series, PAIR_NOT_COMPARABLE when the standard-dose series is no truth for the low dose.
    """
    pre, low, standard = _series(folder)
    pair, truth = _pair(pre, low), _pair(pre, standard)
    acquisition = read_acquisition(pair, protocols)
    check_acquisition(acquisition, allow_unknown=("field_strength", "agent", "dose"))
    _refuse_other_dose(acquisition, read_acquisition(truth))
    prepared, prepared_truth = _prepared(pair, "low"), _prepared(truth, "standard")
    try:
        block = make_block(prepared, prepared_truth, acquisition.conditions(prepared))
    except TripletError as error:
        raise Permanent(Reason.PAIR_NOT_COMPARABLE, str(error)) from error
    return plain(str(pre.header.get("PatientID") or "")) or folder.name, block


def _series(folder: Path) -> list[Series]:
    """The series of each role. All files are read as one study, so that two patients or studies are refused."""
    missing = [role for role in ROLES if not (folder / role).is_dir()]
    if missing:
        raise Permanent(Reason.ONE_SERIES_ONLY, f"no subfolder {', '.join(missing)}")
    study = read_study([file for role in ROLES for file in find_files(folder / role)])
    found: dict[str, list[Series]] = {role: [] for role in ROLES}
    for series in study.series:
        for role in {plane.pixels.path.relative_to(folder).parts[0] for plane in series.planes}:
            found[role].append(series)
    for role, some in found.items():
        if len(some) != 1:
            raise Permanent(Reason.AMBIGUOUS_SERIES, f"{role} holds {len(some)} series of images, not one")
    if len({series.series_uid for some in found.values() for series in some}) < len(ROLES):
        raise Permanent(Reason.AMBIGUOUS_SERIES, "one series is in two subfolders")
    return [found[role][0] for role in ROLES]


def _pair(pre: Series, post: Series) -> Pair:
    """Both are named by their folders; their likeness in sequence and geometry is judged as for any pair."""
    both = Study(str(pre.header.StudyInstanceUID), (pre, post))
    return choose_pair(both, pre.series_uid, post.series_uid)


def _refuse_other_dose(low: Acquisition, standard: Acquisition) -> None:
    """Refuse a standard-dose series that states another dose. It may state its own injection alone, or the sum."""
    agent, second = standard.agent.value, standard.dose_mmol_per_kg.value
    if agent is None or second is None:
        return
    if low.agent.value not in (None, agent):
        raise Permanent(Reason.PAIR_NOT_COMPARABLE, "the low and the standard dose are of different agents")
    usual = BY_NAME[agent].standard_dose_mmol_per_kg
    most = second + (low.dose_mmol_per_kg.value or 0.0)
    if most < STANDARD_DOSE_FRACTION * usual or second > HIGHEST_FRACTION * usual:
        detail = f"the standard-dose series states {second:.3f} mmol/kg, {most:.3f} with the low dose, of {usual:g}"
        raise Permanent(Reason.PAIR_NOT_COMPARABLE, detail)


def _prepared(pair: Pair, role: str) -> Prepared:
    try:
        prepared = prepare(pair.pre.volume(), pair.low.volume())
    except (NoBrainError, RegistrationError) as error:
        raise Permanent(Reason.REGISTRATION_FAILED, f"{role}: {error}") from error
    shut = refused(judge_pair(prepared))
    if shut:
        raise Permanent(GATES[shut[0]], f"{role}: {shut[1]}")
    return prepared
