"""How a rank takes part in the population, and the defaults of it, which train.py's flags have too."""

from dataclasses import dataclass, field

from gossip.decision import Policy
from gossip.network_utils import parse_peer
from gossip.wire_format import WIRE_DTYPES
from runtime.errors import UserError


@dataclass(frozen=True)
class GossipConfig:
    """Raises UserError for values out of their range.

    mixing_rate: chance of a call at each step; policy: whose weights travel, and how they are merged;
    recombination_alpha: share of a fitter peer, 0 to 1; wire_dtype: one of WIRE_DTYPES; peers: "host:port" to call
    beside those in the registry; filesystem_coordinator: keep the registry in the run directory; *_seconds: between
    heartbeats, of silence after which a rank counts as dead, and for a whole exchange; rollback_tolerance: a merge that
    makes one of the judge's losses worse by more (nats per byte) is undone, None: none is.
    """

    mixing_rate: float = 0.04
    policy: Policy = field(default_factory=Policy)
    recombination_alpha: float = 0.5
    wire_dtype: str = "bf16"
    peers: tuple[str, ...] = ()
    filesystem_coordinator: bool = True
    heartbeat_seconds: float = 2.0
    liveness_seconds: float = 30.0
    exchange_seconds: float = 120.0
    rollback_tolerance: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("mixing_rate", "recombination_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected {name} from 0 to 1, got {getattr(self, name)}: choose a share")
        for name in ("heartbeat_seconds", "liveness_seconds", "exchange_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"expected {name} above 0, got {getattr(self, name)}: choose a time in seconds")
        if self.liveness_seconds <= self.heartbeat_seconds:
            raise UserError(
                f"expected liveness_seconds above heartbeat_seconds, got {self.liveness_seconds} and "
                f"{self.heartbeat_seconds}: allow for several heartbeats"
            )
        if self.rollback_tolerance is not None and not self.rollback_tolerance >= 0:
            raise UserError(f"expected rollback_tolerance from 0, got {self.rollback_tolerance}: choose nats per byte")
        if self.wire_dtype not in WIRE_DTYPES:
            raise UserError(f"expected wire_dtype {' or '.join(WIRE_DTYPES)}, got {self.wire_dtype!r}: choose one")
        for peer in self.peers:
            parse_peer(peer)
