"""Short messages to a bank, four for each request, which the demo groups by meaning.

The interaction of the shipped students was trained on messages like these (BANKING77), but not on these: they were
written for the demo before any system had ranked them, and are not adapted to the results. Similar requests (a lost
card and a stolen one, a transfer that is late and one that failed) make the task hard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from d2llm.core.types import Passage, Task
from d2llm.demo.report import DemoAnswer, MessageReport, MessageSystem, top_places
from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.ops.significance import paired_randomisation
from d2llm.retrieval.cosine import AnchorStudent
from d2llm.retrieval.protocols import SearchStudent

TOP_K = 3
"""The number of other messages with the same request."""
MAX_GAINED, MAX_LOST = 2, 1
"""The number of examples shown."""
_WITHOUT = "D2LLM without its interaction"

MESSAGES: dict[str, tuple[str, str, str, str]] = {
    "card lost": (
        "My wallet is gone and the card was in it.",
        "I must have dropped my card on the bus.",
        "I've looked everywhere and can't find my bank card.",
        "What should I do if my card has gone missing?",
    ),
    "card stolen": (
        "Someone took my card out of my bag.",
        "A pickpocket got my card this morning.",
        "My handbag was robbed and they have my bank card now.",
        "Please block my card, it was taken by a thief.",
    ),
    "card has not come": (
        "I ordered a card two weeks ago and the letterbox is still empty.",
        "Where is the plastic you were going to post me?",
        "Nothing from you in the mail so far, when will the card be here?",
        "The card you promised last month never reached me.",
    ),
    "card swallowed": (
        "The machine kept my card.",
        "The cash dispenser wouldn't give the card back.",
        "How can I get my card out of the ATM?",
        "It ate my card after I typed the number.",
    ),
    "card refused at a till": (
        "The shop wouldn't take my card.",
        "I was standing at the checkout and the card didn't go through.",
        "Why was my payment declined at the supermarket?",
        "The waiter said my card had been rejected.",
    ),
    "PIN forgotten": (
        "I don't remember the four digits of my card.",
        "What was my PIN again?",
        "How do I get a new code when I've forgotten the old one?",
        "The secret number of the card has slipped my mind.",
    ),
    "PIN blocked": (
        "I typed the wrong code three times and now it's locked.",
        "How do I unlock my PIN?",
        "Too many wrong tries, my code no longer works.",
        "My PIN has been blocked, can you free it?",
    ),
    "password of the app forgotten": (
        "I can't get into the app, I don't know the password any more.",
        "How do I reset my login?",
        "Please send me a link for a new password.",
        "My phone forgot my password and so did I.",
    ),
    "transfer has not arrived": (
        "I sent my sister money on Monday and she still has nothing.",
        "How long until the person I paid sees the money?",
        "The landlord says the rent I transferred hasn't reached him.",
        "Where is my transfer? It left my account days ago.",
    ),
    "transfer failed": (
        "My transfer was turned down.",
        "Why did sending the money not work?",
        "The app shows an error whenever I try to transfer money.",
        "A bank transfer bounced back to my account.",
    ),
    "transfer to take back": (
        "I sent money to the wrong person, can I have it back?",
        "Please stop the transfer I made a minute ago.",
        "How can I undo a payment to a friend?",
        "I mistyped the account number, call the money back.",
    ),
    "fee for cash": (
        "Why did it cost me something to take out cash?",
        "I was charged for using a cash machine.",
        "Do you take a fee when I withdraw notes?",
        "There's an extra two euros on my withdrawal.",
    ),
    "fee for a transfer": (
        "Why did you charge me for sending money?",
        "Does a transfer cost anything?",
        "I paid more than the amount I transferred, is that a fee?",
        "What do you charge for sending money abroad?",
    ),
    "wrong amount of cash": (
        "The machine gave me fifty but the account says a hundred.",
        "I got less cash than I asked for.",
        "The ATM paid out too little.",
        "Some notes were missing when I withdrew money.",
    ),
    "paid twice": (
        "The restaurant charged me two times for one meal.",
        "One purchase shows up twice on my statement.",
        "I've been billed double for the same thing.",
        "Why is the same payment listed two times?",
    ),
    "payment that is not mine": (
        "There's a purchase on my account that I didn't make.",
        "I've never been in the shop you say I paid.",
        "Who used my card to buy a television?",
        "I don't recognise this payment.",
    ),
    "refund has not come": (
        "I returned the shoes and the shop says it has paid me back, but I see nothing.",
        "Where's my refund?",
        "The store gave me my money back a week ago and it isn't in my account.",
        "How long does a refund take to show up?",
    ),
    "exchange rate": (
        "How many dollars do I get for a euro with you?",
        "Which exchange rate do you use?",
        "Is your rate for foreign money the official one?",
        "What's the rate when I change pounds into euros?",
    ),
    "currencies": (
        "Can I keep Swiss francs in my account?",
        "Which foreign currencies do you support?",
        "Do you have accounts in yen?",
        "What kinds of money can I hold with you?",
    ),
    "top up by card": (
        "Can I load money with a credit card?",
        "How do I put money on the account with my other bank's card?",
        "Which cards can I add funds from?",
        "I want to top up with my Visa.",
    ),
    "top up failed": (
        "I tried to add money and it was refused.",
        "Why didn't my top up go through?",
        "Loading the account ended with an error.",
        "My deposit from the card was cancelled.",
    ),
    "identity check": (
        "Why do you want to see my passport?",
        "Which papers do I need to prove who I am?",
        "How do I verify my identity?",
        "The photo of my driving licence isn't accepted.",
    ),
    "new address": (
        "I'm moving house, how do I tell you?",
        "Please change where you send my letters.",
        "My street has changed, where do I enter that?",
        "Update my home address.",
    ),
    "close the account": (
        "I don't want to be a customer any more.",
        "How do I delete my account?",
        "Please end my contract with you.",
        "I'm going to another bank, close everything.",
    ),
}
"""Request -> its four messages."""


def messages() -> list[Passage]:
    """The messages as passages; the title is the request, the id the request with a number ("card lost 2")."""
    return [
        Passage(f"{request} {number}", text, request)
        for request, texts in MESSAGES.items()
        for number, text in enumerate(texts, start=1)
    ]


def request_of(answer: DemoAnswer) -> str:
    """The request of an example's message."""
    return answer.right_ids[0].rpartition(" ")[0]


def interaction_weight(student: Student, task: Task) -> float:
    """Weight of the interaction in a student's score, chosen on its dev data; 0 if it has no interaction."""
    head = student.interaction
    if not isinstance(head, Interaction):
        return 0.0
    return float(head.interaction_weight(task)) if head.has_anchor else 1.0


def rank_messages(student: Student, cosine: SearchStudent) -> MessageReport:
    """Rank all other messages for each message, and count how many of the first three make the same request.

    Args:
        student: scores in the symmetric task, with and without its interaction.
        cosine: the untuned baseline.
    """
    passages = messages()
    request = np.unique([message.title for message in passages], return_inverse=True)[1]
    texts = [message.text for message in passages]  # without the titles, which name the request
    encoded = student.encode_queries(texts).vectors, student.encode_passages(texts).vectors
    scores = {
        "cosine, untuned": _score(cosine, cosine.encode_queries(texts).vectors, cosine.encode_passages(texts).vectors)
    }
    if student.has_anchor:
        scores[_WITHOUT] = _score(AnchorStudent(student), *encoded)
    scores["D2LLM"] = _score(student, *encoded)
    hits = {name: request[_order(values)[:, :TOP_K]] == request[:, None] for name, values in scores.items()}
    p_value, gains, examples = None, np.zeros(len(passages), np.int64), ()
    if student.has_anchor:
        gains = hits["D2LLM"].sum(1) - hits[_WITHOUT].sum(1)
        p_value = paired_randomisation(hits["D2LLM"].sum(1), hits[_WITHOUT].sum(1))
        by_gain = np.argsort(-gains, kind="stable")
        gained, lost = by_gain[gains[by_gain] > 0][:MAX_GAINED], by_gain[gains[by_gain] < 0][::-1][:MAX_LOST]
        examples = tuple(
            _example(passages, place, scores[_WITHOUT][place], scores["D2LLM"][place])
            for place in (*gained.tolist(), *lost.tolist())
        )
    return MessageReport(
        num_messages=len(passages),
        num_requests=len(MESSAGES),
        interaction_weight=interaction_weight(student, "symmetric"),
        systems=tuple(MessageSystem(name, float(hit.mean()), float(hit[:, 0].mean())) for name, hit in hits.items()),
        p_value=p_value,
        num_better=int((gains > 0).sum()),
        num_worse=int((gains < 0).sum()),
        examples=examples,
    )


def _score(scorer: SearchStudent, queries: NDArray[np.float32], passages: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores [queries, passages] of every text against every other; each text itself gets -inf."""
    scores = np.stack([scorer.score(query, passages, "symmetric") for query in queries])
    np.fill_diagonal(scores, -np.inf)
    return scores


def _order(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=-1, kind="stable")


def _example(
    passages: Sequence[Passage], place: int, without: NDArray[np.float32], whole: NDArray[np.float32]
) -> DemoAnswer:
    message = passages[place]
    by_without, by_whole = (
        [(passages[at], float(scores[at])) for at in _order(scores).tolist()] for scores in (without, whole)
    )

    def is_same(other: Passage) -> bool:
        return other.title == message.title

    return DemoAnswer(
        question=message.text,
        right_ids=tuple(other.id for other in passages if is_same(other) and other.id != message.id),
        baseline=top_places(by_without, by_whole, is_same, TOP_K),
        d2llm=top_places(by_whole, by_without, is_same, TOP_K),
    )
