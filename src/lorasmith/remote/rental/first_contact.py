"""The first contact with a rented machine: whose host key is it, and does the watchdog run there?

Nothing tells the key of a machine that has just come to be, but the machine itself, in its log, which the
provider serves over https to whoever has the account's key. Where the log stays silent, the first key seen
is taken, and that is said and recorded. From then on no other is accepted.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from lorasmith.errors import AccessError, ConnectionLostError, MachineError, ProviderError, RemoteError
from lorasmith.records.remote import Rental
from lorasmith.remote.rental.provider import Instance
from lorasmith.remote.rental.rent import Renter
from lorasmith.remote.rental.watchdog import SIGN
from lorasmith.remote.ssh import Host, SshTransport
from lorasmith.remote.state import rental_hosts, state_folder

SSH_SECONDS = 600.0
"""How long the ssh server of a running machine may take to answer."""
LOG_SECONDS = 120.0
"""How long the host key may take to appear in the machine's log."""
_PAUSE = 5.0
_PRINT = re.compile(rf"{SIGN} (SHA256:[A-Za-z0-9+/]{{43}})(?![A-Za-z0-9+/])")


def own_key() -> Path:
    """The ssh key that lorasmith uses for rented machines; made once."""
    path = state_folder() / "rented_ed25519"
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lorasmith", "-f", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def open_transport(renter: Renter, rental: Rental, machine: Instance, *, user: str = "root") -> SshTransport:
    """A connection to a rented machine, once its ssh server answers, with its host keys pinned.

    Raises `ProviderError` when ssh never comes or the watchdog does not run, `RemoteError` for a machine with
    other keys than its log tells.
    """
    if machine.id is None or not machine.host or not machine.port:
        raise ProviderError("the machine has no address", where=f"instance {machine.id}")
    key = own_key()
    renter.provider.allow_key(machine.id, key.with_suffix(".pub").read_text().strip())
    hosts = rental_hosts(rental.label)
    transport = SshTransport(Host(machine.host, user, machine.port), identity=key, known_hosts=hosts)
    renter.note(rental.label, host=machine.host, port=machine.port)
    told = _told(renter, machine.id)
    until = renter.clock.now() + SSH_SECONDS
    pinned = False
    while True:
        try:
            if not pinned:
                _pin(renter, rental, transport, told)
                pinned = True
            if transport.request({"do": "beat", "folder": "~/.lorasmith"}).get("watchdog"):
                return transport
            problem: MachineError = RemoteError("the watchdog does not run on the machine")
        except (ConnectionLostError, AccessError) as error:  # server and key take a while
            problem = error
        if renter.clock.now() >= until:
            raise ProviderError(
                f"the machine runs, but cannot be used: {problem.found}",
                where=f"instance {machine.id}, {machine.host}:{machine.port}",
                remedy="take another offer",
            ) from problem
        renter.clock.sleep(_PAUSE)


def _pin(renter: Renter, rental: Rental, transport: SshTransport, told: list[str]) -> None:
    """Accept the keys that the log tells, or the first ones seen; either way write down which, and why."""

    def accept(name: str, prints: list[str]) -> bool:
        renter.say(
            f"host key of {name}: {', '.join(prints)}. The provider tells none, so that this one is taken on"
            " trust; from now on no other is accepted"
        )
        return True

    prints = transport.trust(fingerprint=told) if told else transport.trust(confirm=accept)
    if told:
        renter.say(f"host key {', '.join(prints)}: as the machine's log at {renter.provider.name} tells")
    renter.note(
        rental.label,
        host_keys=prints,
        host_key_from="the instance's log" if told else "first contact",
    )


def _told(renter: Renter, number: int) -> list[str]:
    """Fingerprints in the machine's own log; none where the log does not appear in time."""
    until = renter.clock.now() + LOG_SECONDS
    while True:
        try:
            lines = renter.provider.log(number, SIGN)
        except ProviderError:
            lines = []
        prints = [match[1] for line in lines if (match := _PRINT.search(line))]
        if prints or renter.clock.now() >= until:
            return list(dict.fromkeys(prints))
        renter.clock.sleep(_PAUSE)
