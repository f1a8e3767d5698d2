"""Every `loss.kind`. To add one, import its class and name it here."""

from flipscale.objectives.classify import Classify
from flipscale.objectives.contrastive import Contrastive
from flipscale.objectives.objective import Objective
from flipscale.objectives.own_models.captioning import Captioning
from flipscale.objectives.questions.answer import Answer
from flipscale.objectives.sigmoid import Sigmoid

KINDS: dict[str, type[Objective]] = {
    "infonce": Contrastive,
    "sigmoid": Sigmoid,
    "captioning": Captioning,
    "classify": Classify,
    "answer": Answer,
}
