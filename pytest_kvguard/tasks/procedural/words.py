"""The closed inventories that the procedural tasks draw from; nothing else is ever named."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ana Ben Carla David Emma Felix Grace Hugo Ines Jonas Karin Leo Maria Noah Olga Peter Quinn "
    "Rosa Simon Tina Ulla Victor Wanda Xenia Yusuf Zoe Arthur Bella Carlos Diana Erik Fiona "
    "George Hanna Ivan Julia Kevin Laura Martin Nina"
)

CONTAINERS = {  # singular to plural; no vowel in front, so that the article is always "a"
    one: one + ("es" if one.endswith(("x", "ch")) else "s")
    for one in _words(
        "crate box basket bag jar tray cart drawer barrel bucket bowl pot sack chest carton "
        "packet pouch case bin tin trunk locker cup rack wagon van truck boat pan "
        "tub vase purse wallet folder kettle hamper parcel pocket bench"
    )
}

GOODS = _words(
    "apples pears plums lemons cherries melons onions carrots potatoes tomatoes coins stamps "
    "pencils buttons candles marbles shells stones books cards"
)

THINGS = _words("code number room locker seat age score ticket table level")

ADJECTIVES = _words(
    "quiet old green narrow bright cold gentle heavy small wide grey soft dusty tall pale "
    "golden slow round deep silver"
)

PLACES = _words(
    "river hill garden road forest bridge tower field lake village harbour valley meadow "
    "station market castle island window kitchen roof"
)

MOVES = _words("lies stands rests waits shines turns sleeps grows fades rises")

PREPOSITIONS = _words("near behind above below beside under")

ITEMS = _words(
    "lamp rope coin map knife brush spoon clock flute drum scarf glove kite ladder mirror "
    "needle pillow ring shovel torch umbrella violin whistle blanket candle hammer bottle key "
    "ball hat"
)

OPENINGS = _words("hello answer listen today friend")

ENDINGS = _words("amber thanks done over goodbye")

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Belgium": "Brussels",
    "Russia": "Moscow",
    "Ukraine": "Kyiv",
    "Romania": "Bucharest",
    "Bulgaria": "Sofia",
    "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Ghana": "Accra",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Turkey": "Ankara",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
}

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "high": "low",
    "young": "old",
    "rich": "poor",
    "early": "late",
    "hard": "soft",
    "dark": "bright",
    "full": "empty",
    "wet": "dry",
    "near": "far",
    "open": "closed",
    "strong": "weak",
    "thick": "thin",
    "happy": "sad",
    "clean": "dirty",
    "long": "short",
    "left": "right",
    "loud": "quiet",
}

YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "horse": "foal",
    "sheep": "lamb",
    "goat": "kid",
    "lion": "cub",
    "hen": "chick",
    "duck": "duckling",
    "goose": "gosling",
    "deer": "fawn",
    "pig": "piglet",
    "frog": "tadpole",
    "swan": "cygnet",
}
