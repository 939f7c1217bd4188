"""What the demo sorts by meaning: short messages to a bank, four to a request.

The interaction of the shipped students was taught on messages like these (BANKING77), not on these: they were written
for the demo before any system had ranked them, and are not changed by how a system does. Requests that lie close
together (a lost card and a stolen one, a transfer that is late and one that failed) make it hard.
"""

from __future__ import annotations

from d2llm.core.types import Passage

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
"""Request -> four messages that make it."""


def messages() -> list[Passage]:
    """Each as a passage whose id is its request and a number ("card lost 2")."""
    return [
        Passage(f"{request} {number}", text)
        for request, texts in MESSAGES.items()
        for number, text in enumerate(texts, start=1)
    ]


def request(message_id: str) -> str:
    """The request that a message makes: "card lost" of "card lost 2"."""
    return message_id.rpartition(" ")[0]
