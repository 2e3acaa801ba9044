"""Makes impressions of MovieLens: 40 films shown to a person, of which 10 are to be found.

A person's ratings in order of time are cut into runs of 20. The 10 best rated are the truths, the
other 10 were chosen by the person too and are the hard negatives; 10 popular films and 10 of any
kind that the person never rated join them. The last tenth in time is for the test, the tenth
before it for validation.

All that a model is told of a film or a person was known before the impression began.
"""

import dataclasses

import numpy as np

RUN, TRUTHS, HISTORY = 20, 10, 50
ITEMS = RUN + 20
NEUTRAL = 3.5  # a rating that says nothing: about the mean of all
PRIOR = 10.0  # such ratings with which a film's mean begins
SPLIT = 0.1


@dataclasses.dataclass(frozen=True)
class Impressions:
    """Holds impressions in order of time; item 0 is none, user 0 is one that was never seen."""

    user: np.ndarray  # [I]
    items: np.ndarray  # [I, 40]
    truth: np.ndarray  # [I, 40], bool
    mean: np.ndarray  # [I, 40], of a film's ratings so far
    count: np.ndarray  # [I, 40], of these ratings
    history: np.ndarray  # [I, 50], the films that the person rated last
    liking: np.ndarray  # [I, 50], their ratings less 3.5

    def __len__(self):
        return len(self.user)

    def take(self, some) -> "Impressions":
        """Returns some of the impressions."""
        return Impressions(*(getattr(self, f.name)[some] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class MovieLens:
    """Holds the three parts, and what is known of the films: their genres [M, G] and year [M]."""

    train: Impressions
    validation: Impressions
    test: Impressions
    genres: np.ndarray
    year: np.ndarray
    num_users: int


def make(ratings: dict[str, np.ndarray], seed: int = 0) -> MovieLens:
    """Returns the impressions of ratings with the columns of `examples.data movielens`."""
    order = np.argsort(ratings["timestamp"], kind="stable")
    columns = {name: column[order] for name, column in ratings.items()}
    films, first, item = np.unique(columns["movieId"], return_index=True, return_inverse=True)
    user = np.unique(columns["userId"], return_inverse=True)[1] + 1
    item, rating, time = item + 1, columns["rating"], columns["timestamp"]
    runs = _runs(user, time)
    begins = np.array([time[run[0]] for run in runs])
    runs = [runs[i] for i in np.argsort(begins, kind="stable")]
    begins = np.sort(begins)
    cuts = round((1 - 2 * SPLIT) * len(runs)), round((1 - SPLIT) * len(runs))
    known = time < begins[cuts[0]]
    popularity = np.bincount(item[known], minlength=len(films) + 1)
    rng, seen = np.random.default_rng(seed), _seen(user, item, len(films) + 1)
    rows = [_candidates(run, item, rating, seen[user[run[0]]], popularity, rng) for run in runs]
    items, truth = (np.stack(column) for column in zip(*rows, strict=True))
    mean, count = _so_far(item, rating, time, items, begins)
    histories = [
        _history(run[0], begin, user, item, rating, time)
        for run, begin in zip(runs, begins, strict=True)
    ]
    history, liking = (np.stack(column) for column in zip(*histories, strict=True))
    users = np.array([user[run[0]] for run in runs])
    # A person who comes later has no embedding of their own.
    users = np.where(np.isin(users, users[: cuts[0]]), users, 0)
    everything = Impressions(users, items, truth, mean, count, history, liking)
    parts = (everything.take(slice(*ends)) for ends in ((0, cuts[0]), cuts, (cuts[1], None)))
    genres, year = _of_films(columns, first)
    return MovieLens(*parts, genres, year, int(user.max()) + 1)


def _runs(user, time) -> list[np.ndarray]:
    """Returns the places of each person's ratings, 20 at a time; a shorter rest is left out."""
    by_user = np.lexsort((time, user))
    ends = np.flatnonzero(np.diff(user[by_user])) + 1
    runs = []
    for own in np.split(by_user, ends):
        whole = len(own) // RUN * RUN
        runs += list(own[:whole].reshape(-1, RUN))
    return runs


def _seen(user, item, num_items: int) -> np.ndarray:
    seen = np.zeros((user.max() + 1, num_items), bool)
    seen[user, item] = True
    return seen


def _candidates(run, item, rating, seen, popularity, rng):
    """Returns the 40 items of an impression in random order, and which are the truths."""
    by_rating = run[np.lexsort((rng.random(RUN), -rating[run]))]  # ties by lot
    unseen = ~seen
    unseen[0] = False
    # The largest of log n plus Gumbel noise: a sample in proportion to n, without replacement.
    lot = np.where(unseen & (popularity > 0), np.log(np.maximum(popularity, 1)), -np.inf)
    popular = np.argpartition(-(lot + rng.gumbel(size=len(lot))), 10)[:10]
    unseen[popular] = False
    others = rng.choice(np.flatnonzero(unseen), 10, replace=False)
    items = np.concatenate([item[by_rating], popular, others])
    mixed = rng.permutation(ITEMS)  # so that ties, which go by place, tell nothing
    return items[mixed], (np.arange(ITEMS) < TRUTHS)[mixed]


def _so_far(item, rating, time, items, begins):
    """Returns the smoothed mean and the number of the ratings of items before given times."""
    by_item = np.lexsort((time, item))
    span = int(time.max()) + 1
    key = item[by_item] * span + time[by_item]
    total = np.concatenate([[0.0], np.cumsum(rating[by_item])])
    start = np.searchsorted(key, items * span)
    end = np.searchsorted(key, items * span + begins[:, None])
    count = end - start
    mean = (total[end] - total[start] + PRIOR * NEUTRAL) / (count + PRIOR)
    return mean.astype(np.float32), count.astype(np.float32)


def _history(first, begin, user, item, rating, time):
    """Returns the last films that a person rated before the impression, and how they liked them."""
    own = np.flatnonzero((user == user[first]) & (time < begin))[-HISTORY:]
    films, liking = np.zeros(HISTORY, np.int64), np.zeros(HISTORY, np.float32)
    films[: len(own)], liking[: len(own)] = item[own], rating[own] - NEUTRAL
    return films, liking


def _of_films(columns, first):
    """Returns the genres [M, G], zeros and ones, and decades since 1900 [M]; film 0 is none."""
    lists = [text.split("|") for text in columns["genres"][first]]
    names = sorted({name for names in lists for name in names})
    genres = np.zeros((len(first) + 1, len(names)), np.float32)
    for film, own in enumerate(lists, 1):
        genres[film, [names.index(name) for name in own]] = 1
    year = np.nan_to_num(columns["year"][first].astype(np.float32), nan=1990.0)
    return genres, np.concatenate([[0], (year - 1900) / 10]).astype(np.float32)
