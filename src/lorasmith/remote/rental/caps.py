"""The guard of the money caps: one rule for both ends, the client here and the watchdog on the machine.

Sent with the request to rent, in front of the watchdog, to a machine that has a bare Python 3.8 or newer: it
needs nothing but the standard library. Comparisons are written so that a NaN ends the rental, never prolongs
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RISE = 1.01
"""A price this many times that of the offer has risen.

Below it are the roundings of two answers: search and instance each add up machine and disk for themselves.
"""


@dataclass(frozen=True)
class Caps:
    """What may be spent at most."""

    price: float
    """US dollars an hour."""
    cost: float
    """US dollars in all, traffic included."""
    hours: float
    grace: float = 1800.0
    """Seconds without a job and without anybody here, after which the machine destroys itself."""


def usable_price(price: object) -> bool:
    """Whether this is a price at all: a finite number above zero."""
    return isinstance(price, (int, float)) and not isinstance(price, bool) and 0 < price < math.inf


@dataclass
class Spending:
    """What a rental has cost, by the worst of everything that was heard of its price."""

    began: float
    """Beginning of the rental, in seconds since 1970."""
    offered: float
    """US dollars an hour that were agreed to."""
    price: float
    """Highest price of offer, instance and bill, in US dollars an hour."""
    traffic: float = 0.0
    """US dollars for traffic so far."""
    ahead: float = 0.0
    """US dollars by which the provider's bill once exceeded what is counted here."""
    wrong: str = ""
    """Complaint about what was heard instead of a price; empty while there is one."""

    def see_price(self, price: object) -> None:
        """Take in a price that the provider states; whatever is none ends the rental."""
        if not usable_price(price):
            self.wrong = f"the provider states no price that can be reckoned with: {price!r:.40}"
        else:
            # All hours are counted at the highest price: when it rose between two looks is not known.
            self.price = max(self.price, float(price))  # type: ignore[arg-type]

    def see_bill(self, dollars: float, now: float) -> None:
        """Take in what the provider has billed until now."""
        if not 0 <= dollars < math.inf:
            self.wrong = f"the provider bills {dollars!r:.40} dollars"
        else:
            self.ahead = max(self.ahead, dollars - (self.dollars(now) - self.ahead))

    def hours(self, now: float) -> float:
        """Hours since the beginning."""
        return (now - self.began) / 3600

    def dollars(self, now: float) -> float:
        """US dollars so far."""
        return self.hours(now) * self.price + self.traffic + self.ahead


def breach(caps: Caps, spending: Spending, now: float) -> str:
    """Why the machine has to go now, as one sentence; nothing to say while all caps hold."""
    if spending.wrong:
        return spending.wrong
    if not spending.price <= min(spending.offered * RISE, caps.price):
        return (
            f"the machine costs ${spending.price:.3f} an hour, more than the ${spending.offered:.3f} offered"
        )
    if not (spending.hours(now) < caps.hours and spending.dollars(now) < caps.cost):
        spent = f"${spending.dollars(now):.2f} in {spending.hours(now):.2f} hours at ${spending.price:.3f}"
        return f"the cap is reached: {spent}, ${spending.traffic:.2f} of it for traffic"
    return ""
