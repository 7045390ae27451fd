"""Records of work on another machine: the job, the machine, the rental."""

from __future__ import annotations

from typing import ClassVar, Literal

from lorasmith.records.base import Part, Record


class Transfer(Part):
    """A file or folder here, and its place in the job's folder there."""

    local: str
    remote: str
    """Relative to the job's folder: `in/0/base`, `out/0/run`."""


class HubInput(Part):
    """A model that the other machine fetches from the hub itself."""

    repository: str
    revision: str | None
    remote: str


class RemoteJob(Record):
    """One command on another machine, as this machine remembers it. Holds no secrets."""

    FORMAT: ClassVar[str] = "lorasmith/remote-job/1"

    id: str
    """The same for the same command on the same machine, so that giving it again goes on with it."""
    host: str
    port: int | None = None
    identity: str | None = None
    """The file of the private key, where one was named."""
    folder: str
    """lorasmith's folder on the other machine; relative ones lie in the home folder."""
    command: list[str]
    """Arguments of `lorasmith` there, with paths relative to the job's folder."""
    inputs: list[Transfer]
    hub: list[HubInput] = []
    outputs: list[Transfer]
    extras: list[str]
    python: str | None = None
    """An interpreter there that has lorasmith's dependencies; None for an environment of its own."""
    environment: list[str] = []
    """Names of the variables that are passed on; their values are never written down."""
    fetched: bool = False
    """True once the results are here and verified."""


class RemoteMachine(Part):
    """What another machine has."""

    python: str
    system: str
    folder: str
    """Absolute path of lorasmith's folder there."""
    disk_free: int
    memory: int
    cores: int
    gpus: list[str]
    rsync: bool


class RemoteStatus(Part):
    """Where a job stands."""

    phase: Literal["absent", "uploading", "installing", "fetching models", "running", "ended", "lost"]
    code: int | None = None
    """Exit code of the command once it has ended."""
    reason: str = ""
    """Why it ended without a code of its own."""
    plan: str | None = None
    """SHA-256 of the command, its inputs and its environment, as they were when it was started."""
    seconds: float | None = None
    log_bytes: int = 0


class Rental(Record):
    """A machine that is being paid for, written to disk before it is asked for."""

    FORMAT: ClassVar[str] = "lorasmith/rental/1"

    label: str
    """Set on the instance by the request that creates it: by it alone it can be found again."""
    provider: str
    state: Literal["asked", "rented", "refused", "gone"]
    offer: int | None = None
    instance: int | None = None
    price_per_hour: float
    """US dollars, disk included: the highest of offer, instance and bill that was seen."""
    offered_price: float | None = None
    """US dollars an hour of the offer that was taken; None in records from before it was kept apart."""
    disk_per_hour: float = 0.0
    """US dollars of `price_per_hour` that the disk takes."""
    upload_per_gb: float = 0.0
    download_per_gb: float = 0.0
    """US dollars for traffic from the machine and to it."""
    planned: float | None = None
    """US dollars that were estimated before it was rented."""
    max_price: float
    max_cost: float
    max_hours: float
    asked_at: float
    """Seconds since 1970, of this machine's clock."""
    gone_at: float | None = None
    host: str | None = None
    port: int | None = None
    """Port of its ssh server, once it had one."""
    host_keys: list[str] = []
    """SHA-256 fingerprints of the ssh server; no other is accepted for as long as it is rented."""
    host_key_from: Literal["the instance's log", "first contact"] | None = None
    """What vouches for the keys: the log that the provider serves, or nothing."""
    sent_bytes: int = 0
    received_bytes: int = 0
    """Bytes by the machine's own count since it started; downloads of packages and models included."""
    billed_ahead: float = 0.0
    """US dollars by which the provider's bill once exceeded what was counted here."""
    outputs: list[str] = []
    """Where results of this rental go on this machine."""


class RentalRecord(Record):
    """`rentals.json` of a run folder: every machine that was rented for it."""

    FORMAT: ClassVar[str] = "lorasmith/rentals/1"

    rentals: list[Rental]
