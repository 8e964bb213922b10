"""Which snapshots `forget` keeps: a policy, and what it decides about each snapshot, with the reasons.

Snapshots are judged in groups of the same host and paths, the newest first; each rule keeps what it keeps, and a
snapshot is forgotten that no rule keeps.

- `last` keeps so many of the newest. `hourly` … `yearly` keep the newest one of each of the last so many hours, days,
  weeks, months or years that have one. While such a rule has not kept its number, it keeps the oldest as well, so that
  the history reaches back as far as the rule allows.
- `within` keeps what is at most so old, seen from the group's newest snapshot: a host that is switched off loses
  nothing. One from the future, of a wrong clock, is taken as of now.
- `tags` keeps what has one of the tags; of `a,b` both are wanted.

Invariants:

- A policy with larger numbers, a longer duration or more tags keeps all that the smaller one keeps.
- An interrupted snapshot is kept by no rule and counted by none. It is forgotten only when a complete one of its group
  began later.
- Pure: the clock is an argument. The zone, by which days begin, is that of the machine unless one is given.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final, Protocol, TypeAlias

from basin.errors import InvalidArgument

UNLIMITED: Final = -1
"""In the place of a number: keep all."""

_DURATION: Final = re.compile(r"(?:(\d{1,9})y)?(?:(\d{1,9})m)?(?:(\d{1,9})d)?(?:(\d{1,9})h)?")
_SECOND_NS: Final = 1_000_000_000
_SECONDS_MAX: Final = 253_402_000_000
"""Some days before the end of the year 9999, so that every zone can hold it."""

Group: TypeAlias = tuple[str, tuple[str, ...]]


class Candidate(Protocol):
    """What is asked of a snapshot. `start_ns`: nanoseconds since 1970."""

    @property
    def id(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def paths(self) -> Sequence[str]: ...
    @property
    def tags(self) -> Sequence[str]: ...
    @property
    def complete(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Duration:
    """A span of the calendar: years and months as long as they are, at the same time of day."""

    years: int = 0
    months: int = 0
    days: int = 0
    hours: int = 0

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read `2y5m7d3h`, of which each part may be absent but not all. Raises `InvalidArgument`."""
        found = _DURATION.fullmatch(text.strip().lower())
        if not found or not text.strip():
            raise InvalidArgument(f"not a duration: {text!r}; write years, months, days and hours as in 2y5m7d3h")
        return cls(*(int(part or 0) for part in found.groups()))

    def __bool__(self) -> bool:
        return any((self.years, self.months, self.days, self.hours))

    def __str__(self) -> str:
        parts = ((self.years, "y"), (self.months, "m"), (self.days, "d"), (self.hours, "h"))
        return "".join(f"{number}{unit}" for number, unit in parts if number) or "0h"

    def before(self, moment: datetime, zone: tzinfo | None) -> datetime:
        """So long before, by the clocks of the zone; the last of a month that is shorter. Long ago: the year 1."""
        wall = moment.astimezone(zone).replace(tzinfo=None)
        months = 12 * (wall.year - self.years) + wall.month - 1 - self.months
        year, month = divmod(months, 12)
        try:
            day = min(wall.day, calendar.monthrange(year, month + 1)[1])
            wall = wall.replace(year=year, month=month + 1, day=day) - timedelta(days=self.days)
            return _in_zone(wall, zone).astimezone(UTC) - timedelta(hours=self.hours)
        except (ValueError, OverflowError, calendar.IllegalMonthError):
            return datetime.min.replace(tzinfo=UTC)


def _in_zone(wall: datetime, zone: tzinfo | None) -> datetime:
    return wall.astimezone() if zone is None else wall.replace(tzinfo=zone)


@dataclass(frozen=True, slots=True)
class Policy:
    """What to keep. Numbers are 0 (no such rule), more, or `UNLIMITED`.

    Raises `InvalidArgument` for a policy that keeps nothing, and for other numbers.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: Duration | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        numbers = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        if any(type(number) is not int or number < UNLIMITED for number in numbers):
            raise InvalidArgument("a number of snapshots to keep is 0 or more, or -1 for all of them")
        if isinstance(self.tags, str) or not all(_words(tag) for tag in self.tags):
            raise InvalidArgument("the tags to keep are a list of words, none of them empty")
        if not any(numbers) and not self.within and not self.tags:
            raise InvalidArgument("this policy keeps nothing: name at least one rule")


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a snapshot, and why. `reasons` are for people, and never empty."""

    snapshot: Candidate
    keep: bool
    reasons: tuple[str, ...]


def group_of(snapshot: Candidate) -> Group:
    """Host and paths: snapshots with the same ones follow one another."""
    return snapshot.host, tuple(sorted(set(snapshot.paths)))


def decide(
    snapshots: Iterable[Candidate], policy: Policy, now_ns: int, *, zone: tzinfo | None = None
) -> list[Decision]:
    """A decision about each snapshot, in the order in which they were given.

    `now_ns`: nanoseconds since 1970. `zone`: by whose clocks hours to years are counted; by default the machine's.
    """
    given = list(snapshots)
    groups: dict[Group, list[int]] = {}
    for index, one in enumerate(given):
        groups.setdefault(group_of(one), []).append(index)
    reasons: dict[int, list[str]] = {}
    for indexes in groups.values():
        indexes.sort(key=lambda index: (given[index].start_ns, given[index].id), reverse=True)
        complete = [index for index in indexes if given[index].complete]
        for at, why in _kept([given[index] for index in complete], policy, now_ns, zone):
            reasons.setdefault(complete[at], []).append(why)
        newest_ns = given[complete[0]].start_ns if complete else None
        for index in indexes:
            one = given[index]
            if not one.complete and (newest_ns is None or newest_ns <= one.start_ns):
                reasons[index] = ["interrupted, and no later snapshot is complete"]
    return [
        Decision(one, index in reasons, tuple(reasons.get(index) or [_why_not(one)])) for index, one in enumerate(given)
    ]


def _why_not(snapshot: Candidate) -> str:
    return "no rule keeps it" if snapshot.complete else "interrupted, and a later snapshot is complete"


def _kept(
    newest_first: Sequence[Candidate], policy: Policy, now_ns: int, zone: tzinfo | None
) -> Iterable[tuple[int, str]]:
    """Which of a group's complete snapshots are kept, each with a reason."""
    if not newest_first:
        return
    moments = [_moment(one.start_ns, zone) for one in newest_first]
    for label, number, period_of in _rules(policy):
        for at in _of_periods(list(map(period_of, moments)), number):
            yield at, label
    yield from ((at, "last snapshot") for at in range(_count(policy.last, len(moments))))
    if policy.within:
        newest = min(moments[0], _moment(now_ns, zone))
        since = policy.within.before(newest, zone)
        yield from ((at, f"within {policy.within}") for at, moment in enumerate(moments) if moment >= since)
    for tag in policy.tags:
        wanted = _words(tag)
        yield from ((at, f"tag {tag}") for at, one in enumerate(newest_first) if wanted <= set(one.tags))


def _rules(policy: Policy) -> list[tuple[str, int, Callable[[datetime], Hashable]]]:
    return [
        ("hourly snapshot", policy.hourly, _hour),
        ("daily snapshot", policy.daily, datetime.date),
        ("weekly snapshot", policy.weekly, lambda moment: moment.isocalendar()[:2]),
        ("monthly snapshot", policy.monthly, lambda moment: (moment.year, moment.month)),
        ("yearly snapshot", policy.yearly, lambda moment: moment.year),
    ]


def _hour(moment: datetime) -> Hashable:
    """The hour; that which comes twice when the clocks are put back is two."""
    return moment.date(), moment.hour, moment.utcoffset()


def _of_periods(periods: Sequence[Hashable], number: int) -> list[int]:
    """The first of each of the first `number` periods, and the very last while that is fewer."""
    firsts = [at for at, period in enumerate(periods) if at == 0 or period != periods[at - 1]]
    kept = firsts[: _count(number, len(firsts))]
    if number and (number == UNLIMITED or len(kept) < number) and kept[-1] != len(periods) - 1:
        kept.append(len(periods) - 1)
    return kept


def _count(number: int, there: int) -> int:
    return there if number == UNLIMITED else min(number, there)


def _words(tag: str) -> set[str]:
    return {word.strip() for word in tag.split(",")} - {""}


def _moment(time_ns: int, zone: tzinfo | None) -> datetime:
    """A time by the clocks of the zone; one that no calendar holds becomes the nearest that it does."""
    seconds = max(-_SECONDS_MAX // 5, min(time_ns // _SECOND_NS, _SECONDS_MAX))
    return datetime.fromtimestamp(seconds, UTC).astimezone(zone)
