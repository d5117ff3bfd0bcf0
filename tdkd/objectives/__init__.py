"""TD objectives and the behaviour-cloning baselines on the same action set.

An objective is a callable from :class:`tdkd.types.Rows` to one loss a row, ``[N]``; a plain
function will do. Its attributes tell the ops and the trainer what it needs (a function without
them is given everything, counts as one that bootstraps, and is refused nothing):

``bootstraps``
    it reads V' of the successor: rows whose response was cut off do not count (and hold q = 0 where
    the student excludes a member, so that no NaN comes of them).
``normalised``
    it reads ``rows.log_mass`` or ``rows.log_tail``: the student's full normaliser is computed.
``rowwise``
    the loss of a row reads that row alone, and V' and the teacher's side of its successor, and has
    no parameters that learn: the linear forms then compute it, with its gradient, a chunk of rows
    at a time, which spares them a product with the head.
``successors``
    it may read which row follows (``rows.successor``, ``rows.following``) where it does not look
    ahead: True, unless it says that it does not. Chunks of rows then end anywhere, and a GPU need
    not wait to see who follows whom.
``free_level``
    it asks of Q a level that log-probabilities do not have: ``TDTrainer`` warns.
``looks_ahead``
    it reads V' at all: the same as ``bootstraps``, but for a sum, of which one term may.
``starts``
    it counts from the first state of a response: ``rows.occupancy`` is then computed, and a target
    network refused.
``demonstrations``
    it learns from the taken tokens as the data's own: ``TDTrainer`` refuses it where all answers
    are the student's.

``ForwardKL(tail=True) + 0.1 * IQLearn()`` is an objective too, and :func:`parse` makes it from that
text; functions may stand in sums, and ``sum`` adds a list. ``docs/objectives.md`` lists all
objectives and shows how to write one.
"""

from tdkd.objectives.base import Objective, ObjectiveLike, Weighted, as_objective
from tdkd.objectives.imitation import (
    JSD,
    LK,
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    SkewKL,
    TotalVariation,
)
from tdkd.objectives.inverse import LSIQ, SQIL, IQLearn
from tdkd.objectives.soft_td import SoftTD
from tdkd.objectives.text import parse

__all__ = [
    "JSD",
    "LK",
    "LSIQ",
    "SQIL",
    "CrossEntropy",
    "ForwardKL",
    "IQLearn",
    "Objective",
    "ObjectiveLike",
    "ReverseKL",
    "SkewKL",
    "SoftTD",
    "TotalVariation",
    "Weighted",
    "as_objective",
    "parse",
]
