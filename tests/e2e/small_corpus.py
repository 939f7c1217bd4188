"""Sixty sentences on twelve subjects, and eight questions with the number of the sentence that answers each."""

from __future__ import annotations

import json
from pathlib import Path

SENTENCES = """
Bread dough needs to rest for about an hour so that the yeast can make it rise.
A sharp knife is safer in the kitchen than a blunt one because it does not slip.
Boiling pasta in plenty of salted water keeps it from sticking together.
Ripe tomatoes lose their taste when they are kept in the refrigerator.
To poach an egg, slide it into water that simmers but does not boil.
The last train to the harbour leaves at twenty past eleven from platform four.
Seats in the quiet carriage must be booked at least one day ahead.
Bicycles may be taken on regional trains outside of the rush hours.
The tram line to the airport is closed for repairs until the end of June.
Children under six travel free of charge when an adult is with them.
Water the young trees early in the morning, before the sun dries the soil.
Slugs stay away from the lettuce when coffee grounds are spread around it.
Roses are pruned in late winter, just above a bud that points outwards.
Compost smells bad when it holds too much wet grass and too little dry material.
Tulip bulbs are planted in autumn, three times as deep as they are high.
The moon shows us always the same side because it turns once in each orbit.
Saturn's rings consist mostly of pieces of ice, from dust to the size of a house.
Light from the sun reaches the earth after a little more than eight minutes.
A comet's tail points away from the sun, whichever way the comet travels.
Stars twinkle because the air bends their light in ever changing ways.
A cold usually passes within ten days without any medicine.
Press on a bleeding cut with a clean cloth until it stops.
Too little sleep makes it harder to learn and to keep a stable mood.
Cool a burn under running water for ten minutes and do not put butter on it.
Stretching after a long run eases stiff muscles in the legs.
Bees tell each other where flowers are by dancing in the hive.
An octopus has three hearts, and its blood is blue.
Swallows fly thousands of kilometres to spend the winter in Africa.
Cats rub their heads against furniture to leave their scent on it.
A hedgehog sleeps through the cold months under a heap of leaves.
The printer prints blank pages when its nozzles are clogged with dried ink.
Restarting the router often brings a lost internet connection back.
Keep a copy of your photographs in a second place, in case the disk fails.
A long sentence makes a better password than a short word with odd signs.
Close programs that you do not use if the laptop becomes slow and hot.
The museum is closed on Mondays, and free for everyone on the first Sunday.
The painter mixed sand into his colours to give the surface a rough feel.
Old photographs fade in daylight, so the gallery keeps its rooms dim.
The statue in the square was cast in bronze two hundred years ago.
Her drawings show the harbour as it was before the warehouses burned down.
The goalkeeper saved two penalties, and the home side won by one goal.
A marathon is a little more than forty-two kilometres long.
In chess, the king may move two squares only when he castles.
The swimmer broke the record by three hundredths of a second.
Rain stopped the tennis match for the third time this afternoon.
The landlord must return the deposit within two months after you move out.
A parcel can be sent back within fourteen days without giving a reason.
Tax papers should be kept for at least ten years.
The bank blocks the card after a wrong number was entered three times.
Who finds a purse must hand it in at the town's lost property office.
Thunder comes later than lightning because sound is slower than light.
Fog forms when moist air cools down close to the ground.
Salt on the road lowers the temperature at which water freezes.
The wind turns to the west before the rain arrives at this coast.
Hail grows in clouds whose rising air is strong enough to carry ice.
The violin is tuned in fifths, from the low G up to the high E.
A piano should be tuned twice a year, even when nobody plays it.
The choir meets on Thursday evenings in the old school.
A drum sounds lower when its skin is slackened.
The conductor raised her hand, and the whole hall became silent.
""".strip().splitlines()

QUESTIONS = {
    "What should I do when I burned my hand?": 23,
    "How do I get rid of snails in my vegetable garden?": 11,
    "When is the museum not open?": 35,
    "Why does one hear thunder after the flash?": 50,
    "My printer gives me empty sheets, why?": 30,
    "Can I bring my bike on the train?": 7,
    "What are the rings of Saturn made of?": 16,
    "How long may I wait before I send back something I bought online?": 46,
}


def write_beir(folder: Path) -> Path:
    """Write the sentences and questions in the BEIR layout; sentence n has the id ``s<n>``, question n ``q<n>``."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"s{n}", "title": "", "text": text} for n, text in enumerate(SENTENCES)]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUESTIONS)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    lines = [f"q{n}\ts{sentence}\t1" for n, sentence in enumerate(QUESTIONS.values())]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    return folder
