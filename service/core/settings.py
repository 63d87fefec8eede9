"""Everything a site can choose, read once at start-up and then frozen.

Hides where a value comes from: an environment variable `LOWGAD_<NAME>`, a file named by `LOWGAD_<NAME>_FILE` (for
secrets that an orchestrator mounts), the TOML site file named by `LOWGAD_SITE_FILE`, or the default written here, in
that order. A name that nobody knows stops the start-up: a misspelt setting must never be silently ignored. Must never
be read anywhere else, and must never print a value, since a database URL holds a password.
"""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from service.core.dicom.site_rules import KEYWORDS, QUANTITIES, SiteRule
from service.core.job import Kind

PREFIX = "LOWGAD_"
EMBEDDED_BROKER = "embedded"
REPLACED = {"commitment_max_attempts": "commitment_limit_seconds"}  # names of settings that are gone, and what came
SITE_FILE_ONLY = frozenset({"destinations", "commitment_requestors", "protocols"})  # tables; no variable can hold them


class SettingsError(ValueError):
    """A setting is unknown or has an impossible value; the message names the setting and never shows its value."""


def _split(value: object) -> object:
    """Environment variables hold lists as `a, b, c`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


AeTitle = Annotated[str, Field(pattern=r"^[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?$")]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Kinds = Annotated[tuple[Kind, ...], BeforeValidator(_split)]
Port = Annotated[int, Field(ge=0, le=65535)]
Unknown = Literal["field_strength", "agent", "dose"]


class Destination(BaseModel):
    """Where results are sent by C-STORE."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$", description="Name shown to operators")
    host: str = Field(description="Host name or address")
    port: Port = Field(description="TCP port")
    ae_title: AeTitle = Field(description="Called AE title")
    calling_ae_title: AeTitle = Field(default="LOWGAD", description="AE title we introduce ourselves with")
    storage_commitment: bool = Field(default=False, description="Ask for storage commitment after sending")
    commitment_ae_title: AeTitle | None = Field(
        default=None, description="AE title that reports commitment; unset: the one we call"
    )
    commitment_wait_seconds: float = Field(
        default=5.0, ge=0, le=300, description="How long the association stays open for a report on it"
    )

    results: Kinds | None = Field(default=None, description="Kinds of result it is sent; unset: all that are made")

    @property
    def reporting_ae_title(self) -> str:
        """The only AE title whose reports on this destination are believed."""
        return self.commitment_ae_title or self.ae_title

    def takes(self, kind: str) -> bool:
        """Whether this kind of result is sent there."""
        return self.results is None or kind in {wanted.value for wanted in self.results}


class CommitmentRequestor(BaseModel):
    """Who may ask our listener to commit itself to what it received, and where the report goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ae_title: AeTitle = Field(description="Its AE title")
    host: str = Field(description="Host name or address")
    port: Port = Field(description="TCP port")


class Settings(BaseModel):
    """The settings; each field's description is what deploy/operating.md shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(default=Path("var"), description="Folder for database, spool and embedded broker")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder")
    broker_url: str = Field(default=EMBEDDED_BROKER, description="redis://... or `embedded` (files in the data folder)")
    model_dir: Path | None = Field(default=None, description="Model folder with its card; unset: the bundled model")
    engine: Literal["network", "linear"] = Field(default="network", description="Engine when a job names none")
    allow_unknown: Annotated[frozenset[Unknown], BeforeValidator(_split)] = Field(
        default=frozenset(), description="Quantities that may be unknown: field_strength, agent, dose"
    )
    results: Kinds = Field(
        default=(Kind.SD, Kind.SD_PLUS),
        min_length=1,
        description="Kinds of result: sd, sd_plus, subtraction, parametric_map, segmentation, structured_report,"
        " presentation_state",
    )
    watermark: bool = Field(default=True, description="Burn SYNTHETIC - NOT ACQUIRED into the images, outside the head")
    dose_factor: float = Field(default=1.0, gt=0, le=1.5, description="Simulated dose, in standard doses")
    segmentation_threshold: float = Field(
        default=0.1, gt=0, le=1, description="Predicted signal from which the segmentation begins, white matter = 1"
    )

    listen_host: str = Field(default="127.0.0.1", description="Address of the DICOM listener")
    listen_port: Port = Field(default=11112, description="Port of the DICOM listener; 0: any free port")
    ae_title: AeTitle = Field(default="LOWGAD", description="Our AE title; other called titles are rejected")
    allowed_calling_aes: Names = Field(default=(), description="Calling AE titles admitted; empty: any")
    max_associations: int = Field(default=32, ge=1, description="DICOM associations open at the same time")
    max_object_bytes: int = Field(default=1 << 30, ge=1 << 20, description="Largest DICOM object accepted")
    receive_timeout_seconds: float = Field(
        default=30.0, gt=0, description="A peer silent for longer inside a message is cut off"
    )

    api_host: str = Field(default="127.0.0.1", description="Address of REST API and dashboard")
    api_port: Port = Field(default=8080, description="Port of REST API and dashboard; 0: any free port")
    max_upload_bytes: int = Field(default=2 << 30, ge=1, description="Largest upload")
    max_unpacked_bytes: int = Field(default=4 << 30, ge=1, description="Largest unpacked upload")
    max_upload_files: int = Field(default=10_000, ge=1, description="Most files in one upload")

    settle_seconds: float = Field(
        default=3.0, ge=0, description="Silence after which a study with a whole pair of series is ready"
    )
    quiet_seconds: float = Field(default=60.0, ge=0, description="Silence after which an unclear study is complete")
    sweep_seconds: float = Field(
        default=2.0, gt=0, description="Interval between two looks at waiting studies and jobs"
    )
    requeue_seconds: float = Field(default=120.0, gt=0, description="Age at which a job's message counts as lost")
    lease_seconds: float = Field(default=120.0, gt=0, description="A worker silent for longer has lost its job")
    max_attempts: int = Field(default=3, ge=1, description="Starts of one job before it fails")
    task_limit_seconds: float = Field(
        default=3600.0, gt=0, description="A computation or delivery that takes longer has hung: its process is ended"
    )
    retry_seconds: float = Field(default=10.0, gt=0, description="First pause before a job is tried again")
    disk_low_bytes: int = Field(default=2 << 30, ge=0, description="Free disk below which nothing is accepted")
    retention_days: float = Field(default=14.0, gt=0, description="Days after which finished studies are deleted")

    delivery_max_attempts: int = Field(default=12, ge=1, description="Attempts to deliver before a job fails")
    delivery_retry_seconds: float = Field(default=15.0, gt=0, description="First pause before another delivery attempt")
    delivery_retry_max_seconds: float = Field(default=900.0, gt=0, description="Longest pause between attempts")
    commitment_timeout_seconds: float = Field(
        default=3600.0,
        gt=0,
        description="Wait for a commitment report before asking again; longest pause after a failure",
    )
    commitment_limit_seconds: float = Field(
        default=86_400.0, gt=0, description="Time from the first request for storage commitment until a job fails"
    )
    commitment_requestors: tuple[CommitmentRequestor, ...] = Field(
        default=(), description="Who may ask us for storage commitment (site file only); none: nobody"
    )
    destinations: tuple[Destination, ...] = Field(default=(), description="Known destinations (site file only)")
    default_destinations: Names = Field(default=(), description="Destinations of a job that names none")
    protocols: tuple[SiteRule, ...] = Field(
        default=(), description="What series of the site's protocols are: role, agent, dose (site file only)"
    )

    @model_validator(mode="after")
    def _destinations_are_known(self) -> Self:
        names = [destination.name for destination in self.destinations]
        if len(set(names)) < len(names):
            raise ValueError("two destinations share a name")
        if unknown := sorted(set(self.default_destinations) - set(names)):
            raise ValueError(f"default_destinations names unknown destinations: {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _who_reports_commitment_is_admitted(self) -> Self:
        reporting = {item.reporting_ae_title for item in self.destinations if item.storage_commitment}
        reporting |= {item.ae_title for item in self.commitment_requestors}
        if self.allowed_calling_aes and (missing := sorted(reporting - set(self.allowed_calling_aes))):
            raise ValueError(f"storage commitment needs these in allowed_calling_aes, too: {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _results_are_made(self) -> Self:
        images = {Kind.SD, Kind.SD_PLUS, Kind.SUBTRACTION}
        if Kind.PRESENTATION_STATE in self.results and not images & set(self.results):
            raise ValueError("a presentation state needs a series of images to be shown over")
        for destination in self.destinations:
            if missing := set(destination.results or ()) - set(self.results):
                names = ", ".join(sorted(kind.value for kind in missing))
                raise ValueError(f"destination {destination.name} wants results that are not made: {names}")
        return self

    @model_validator(mode="after")
    def _protocols_agree(self) -> Self:
        names = [protocol.name for protocol in self.protocols]
        if len(set(names)) < len(names):
            raise ValueError("two protocols share a name")
        for one, other in itertools.combinations(self.protocols, 2):
            alike = all(getattr(one, pattern) == getattr(other, pattern) for pattern in KEYWORDS)
            values = [{getattr(one, key), getattr(other, key)} - {None} for key in QUANTITIES]
            if alike and max(map(len, values)) > 1:
                raise ValueError(f"protocols {one.name} and {other.name} have the same patterns and disagree")
        return self

    @classmethod
    def load(cls, environ: Mapping[str, str], site_file: Path | None = None) -> Settings:
        """Read the environment and the site file.

        Raises:
            SettingsError: unknown name, impossible value or unreadable file, in words an administrator can act on.
        """
        values, named_file = _from_environ(environ, known=frozenset(cls.model_fields))
        path = site_file or named_file
        text = _read_site_file(path) if path else ""
        site = _from_site_file(text, known=frozenset(cls.model_fields))
        try:
            return cls.model_validate(site | values)
        except ValidationError as error:
            lines = [_explain(item, "" if {*item["loc"][:1]} & {*values} else text) for item in error.errors()]
            raise SettingsError("; ".join(lines)) from None

    @property
    def ledger_url(self) -> str:
        """The SQLAlchemy URL of the ledger, with driver."""
        if not self.database_url:
            return f"sqlite:///{(self.data_dir / 'ledger.sqlite').absolute()}"
        scheme, _, rest = self.database_url.partition("://")
        return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else self.database_url

    @property
    def spool_dir(self) -> Path:
        """Folder of received bytes and results."""
        return self.data_dir / "spool"

    @property
    def broker_dir(self) -> Path:
        """Folder of the embedded broker."""
        return self.data_dir / "broker"

    @property
    def committing(self) -> dict[str, bool]:
        """Whether each destination, by name, is asked for storage commitment."""
        return {item.name: item.storage_commitment for item in self.destinations}

    def reported_by(self, ae_title: str) -> frozenset[str]:
        """Names of the destinations on which that AE title's reports of storage commitment are believed."""
        return frozenset(item.name for item in self.destinations if item.reporting_ae_title == ae_title)

    def destination(self, name: str) -> Destination | None:
        """The destination of that name, if the site file has it."""
        return next((destination for destination in self.destinations if destination.name == name), None)


def _from_environ(environ: Mapping[str, str], known: frozenset[str]) -> tuple[dict[str, Any], Path | None]:
    values: dict[str, Any] = {}
    site_file: Path | None = None
    for variable in sorted(name for name in environ if name.startswith(PREFIX)):
        name = variable.removeprefix(PREFIX).lower()
        if variable == f"{PREFIX}SITE_FILE":
            site_file = Path(environ[variable])
        elif name in known - SITE_FILE_ONLY:
            values[name] = environ[variable]
        elif name.removesuffix("_file") in known - SITE_FILE_ONLY:
            values[name.removesuffix("_file")] = _read_secret(variable, Path(environ[variable]))
        else:
            raise _unknown(variable, [f"{PREFIX}{field.upper()}" for field in known] + [f"{PREFIX}SITE_FILE"])
    return values, site_file


def _read_site_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the site file cannot be read: {error}") from None


def _from_site_file(text: str, known: frozenset[str]) -> dict[str, Any]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the site file cannot be read: {error}") from None
    for name in values:
        if name not in known:
            raise _unknown(name, list(known), _line(text, (name,)))
    return values


def _read_secret(variable: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise SettingsError(f"the file that {variable} names cannot be read") from None


def _unknown(name: str, known: list[str], line: str = "") -> SettingsError:
    prefix, field = PREFIX * name.startswith(PREFIX), name.removeprefix(PREFIX).lower().removesuffix("_file")
    if field in REPLACED:
        successor = REPLACED[field].upper() if prefix else REPLACED[field]
        return SettingsError(f"{line}unknown setting {name}; {prefix}{successor} has taken its place")
    near = difflib.get_close_matches(name, known, n=1)
    return SettingsError(f"{line}unknown setting {name}" + (f"; did you mean {near[0]}?" if near else ""))


_TABLES: dict[str, type[BaseModel]] = {
    "destinations": Destination,
    "commitment_requestors": CommitmentRequestor,
    "protocols": SiteRule,
}


def _explain(error: ErrorDetails, text: str) -> str:
    """One error of validation, with line and key; never the value."""
    location, message = error["loc"], error["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in location)
    table = _TABLES.get(str(location[0])) if location else None
    if error["type"] == "extra_forbidden" and table:
        near = difflib.get_close_matches(str(location[-1]), table.model_fields, n=1)
        message = "unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{_line(text, location)}{where}: {message}" if where else message


def _line(text: str, location: tuple[int | str, ...]) -> str:
    """Where a key stands in the site file, as `line 7: `; its table where the key itself is missing; else nothing.

    The TOML parser of the standard library keeps no lines, so they are looked for.
    """
    lines, start = text.splitlines(), 0
    if len(location) > 1 and isinstance(location[1], int):
        heads = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{location[0]}\s*\]\]", line)]
        if location[1] >= len(heads):
            return ""
        start = heads[location[1]] + 1
    for number, line in enumerate(lines[start:], start=start + 1):
        if re.match(r"\s*\[", line):
            break
        if location and re.match(rf'\s*"?{re.escape(str(location[-1]))}"?\s*=', line):
            return f"line {number}: "
    return f"line {start}: " if start else ""
