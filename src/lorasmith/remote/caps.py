"""What may be spent on a rented machine, and what has been."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.errors import ProviderError, UsageError
from lorasmith.files.spending import rental_cost
from lorasmith.records.remote import Rental
from lorasmith.remote.provider import Offer


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

    def require(self, offer: Offer) -> None:
        """Raise `UsageError` for an offer over the caps."""
        if not 0 < offer.price_per_hour <= self.price:
            raise UsageError(
                f"this offer costs ${offer.price_per_hour:.3f} an hour",
                where=f"offer {offer.id}",
                expected=f"more than 0 and at most ${self.price:.3f}",
                remedy="choose another, or raise --max-price",
            )

    def require_left(self, rental: Rental, now: float) -> None:
        """Raise `ProviderError` once the hours or dollars of a rental are used up."""
        spent = rental_cost(rental, now)
        if spent.hours < self.hours and spent.dollars < self.cost:
            return
        raise ProviderError(
            f"the cap is reached: ${spent.dollars:.2f} in {spent.hours:.2f} hours at"
            f" ${rental.price_per_hour:.3f}, ${spent.traffic:.2f} of it for traffic",
            where=rental.label,
            expected=f"at most {self.hours:g} hours and ${self.cost:.2f}",
            remedy="raise --max-cost or --max-hours and give the command again",
        )
