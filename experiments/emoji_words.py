"""Write assets/emoji/emoji.json: what every emoji is called, what it shows, and where it is drawn.

    npm pack emoji-datasource@16.0.0 && tar xzf emoji-datasource-16.0.0.tgz
    python experiments/emoji_words.py package/emoji.json

The input is the table of that package, in Unicode's order. An emoji's code points spell out what it
is made of: "woman cook" is a woman (1F469), a joiner (200D) and a frying pan (1F373). From these
come the concept, by which emoji are held out together, and the words that instructions use.
"""
import json
import sys
from pathlib import Path

OUTPUT = Path(__file__).parent.parent / "assets" / "emoji" / "emoji.json"

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}

# The code points of one figure in its genders, and the word for each of them.
PEOPLE = [
    {"1F468": "man", "1F469": "woman", "1F9D1": "person"},
    {"1F466": "boy", "1F467": "girl", "1F9D2": "child"},
    {"1F474": "man", "1F475": "woman", "1F9D3": "person"},  # older people
    {"1F934": "man", "1F478": "woman", "1FAC5": "person"},  # with a crown
    {"1F385": "man", "1F936": "woman"},                     # Father and Mother Christmas
    {"1F57A": "man", "1F483": "woman"},                     # dancing
    {"2642": "man", "2640": "woman"},                       # the signs, which follow any figure
]

JOINERS = ("FE0F", "200D")
SIGNS = ("2642", "2640")
# A figure that faces right. It has no person, or edits would pair it with those that face left.
RIGHT = "27A1"

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple",
           "brown", "black", "white", "pink", "grey", "light blue")
COLOURED = ("heart", "circle", "square", "book")

# The noun by which one calls an emoji of these Unicode subcategories, where there is a common one.
NOUNS = {
    "person": ("person", "person-role", "person-activity", "person-sport", "person-fantasy",
               "person-gesture", "person-resting"),
    "cat": ("cat-face",),
    "face": ("face-affection", "face-concerned", "face-glasses", "face-hand", "face-hat",
             "face-negative", "face-neutral-skeptical", "face-sleepy", "face-smiling",
             "face-tongue", "face-unwell"),
    "flag": ("country-flag", "subdivision-flag", "flag"),
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "hand": ("hand-fingers-closed", "hand-fingers-open", "hand-fingers-partial", "hand-prop",
             "hand-single-finger", "hands"),
    "insect": ("animal-bug",),
    "sea animal": ("animal-marine",),
    "reptile": ("animal-reptile",),
    "flower": ("plant-flower",),
    "plant": ("plant-other",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "dish": ("food-prepared", "food-asian"),
    "sweet": ("food-sweet",),
    "drink": ("drink",),
    "heart": ("heart",),
    "vehicle": ("transport-ground",),
    "aircraft": ("transport-air",),
    "boat": ("transport-water",),
    "clock": ("time",),
    "tool": ("tool",),
    "key": ("keycap",),
    "building": ("place-building", "place-religious"),
    "instrument": ("musical-instrument",),
    "garment": ("clothing",),
    "book": ("book-paper",),
    "arrow": ("arrow",),
    "sign": ("transport-sign", "warning", "zodiac", "religion"),
}


def person_and_concept(codes, category):
    """Say whom the code points show, if it is one figure, and which concept they share."""
    figures = []
    concept = []
    for code in codes:
        names = next((figure for figure in PEOPLE if code in figure), None)
        if names:
            figures.append(names[code])
        if code not in SIGNS and code != RIGHT:
            # All genders of a figure are written as the first of them.
            concept.append(next(iter(names)) if names else code)
    person = None
    if len(figures) == 1:
        person = figures[0]
    elif not figures and category == "People & Body":
        person = "person"
    if RIGHT in codes:
        person = None
    return person, "-".join(concept)


def colour_and_thing(short_name):
    """Say the colour and the thing of an emoji such as "blue heart", or (None, None)."""
    words = short_name.replace("_", " ").replace("large ", "").replace("closed book", "red book")
    for thing in COLOURED:
        if words == thing:
            return "red", thing  # the plain heart is red
        for colour in COLOURS:
            if words == f"{colour} {thing}":
                return colour, thing
    return None, None


def row_of(entry):
    """Turn an entry of the package's table into a row of ours."""
    codes = [code for code in entry["unified"].split("-") if code not in JOINERS]
    person, concept = person_and_concept(codes, entry["category"])
    colour, thing = colour_and_thing(entry["short_name"])
    if colour:
        concept = f"coloured {thing}"
    noun = next((n for n, names in NOUNS.items() if entry["subcategory"] in names), None)
    # Pairs of a skin tone and a cell, since JSON has no null key. Two people have two tones.
    cells = [(None, (entry["sheet_x"], entry["sheet_y"]))]
    for code, variant in entry.get("skin_variations", {}).items():
        tone = "+".join(TONES[part] for part in code.split("-"))
        cells.append((tone, (variant["sheet_x"], variant["sheet_y"])))
    return dict(name=(entry["name"] or entry["short_name"]).lower(), concept=concept, person=person,
                colour=colour, noun=noun, category=entry["category"], cells=cells)


def main():
    table = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Every subcategory above exists, and has one noun.
    named = [subcategory for names in NOUNS.values() for subcategory in names]
    assert len(named) == len(set(named))
    assert {entry["subcategory"] for entry in table}.issuperset(named)
    rows = [row_of(entry) for entry in sorted(table, key=lambda entry: entry["sort_order"])]
    # One emoji a line, so that a change shows as one line in a diff.
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(rows)} emoji, {sum(len(row['cells']) for row in rows)} drawings -> {OUTPUT}")


if __name__ == "__main__":
    main()
