"""The word lists of the prompts in `language_tasks`."""


def words(listed: str) -> list[str]:
    """The entries of a list, between bars or, without any, between spaces."""
    return listed.split("|" if "|" in listed else None)


NAMES = words(
    "Anna Omar Lena Ravi Chloe Ivan Maria Pedro Sofia Kenji Amina Lukas Priya Felix Nadia Hugo Clara Samir Elena Oscar "
    "Tara Viktor Jane Marco Ruth Simon Olga Peter Laura Adam Helen David Alice Robert Emma George Julia Martin"
)
VERBS = words(
    "painted sold repaired found cleaned moved borrowed bought carried described drew dropped fixed forgot hid kept "
    "lost measured opened packed photographed polished returned saw stored washed weighed wrapped"
)
OBJECTS = words(
    "a chair|the old clock|two lamps|a bicycle|the green door|a wooden box|three books|a silver spoon|the blue curtain|"
    "a small boat|the kitchen table|a pair of shoes|a heavy suitcase|the broken radio|a glass bowl|some candles|"
    "the garden gate|a paper map|an iron kettle|the red carpet|a basket of apples|the brass bell|a woollen coat"
)
TIMES = words(
    "in the morning|last week|after lunch|on Sunday|before the storm|at noon|in the evening|two days ago|on Friday|"
    "during the summer|late at night|after the meeting|in early spring|before breakfast|on a rainy day|last winter"
)
PLACES = words(
    "in the garden|near the station|at the market|behind the house|in the library|by the river|at the office|"
    "in the attic|on the terrace|at the harbour|in the old barn|beside the church"
)

SECRETS = words(
    "apple river window orange copper tiger bottle castle yellow planet pepper garden silver pocket ladder rocket "
    "button candle forest hammer island jacket kitten lemon mirror needle ocean pencil rabbit saddle table violin "
    "walnut anchor basket carpet desert engine feather guitar"
)

NOUNS = words("food service room music coffee staff soup view bread garden menu bed")
GOOD = words("great lovely excellent friendly fresh charming wonderful clean delicious warm perfect pleasant")
BAD = words("terrible slow dirty awful cold boring rude stale noisy broken disappointing ugly")
GOOD_ENDS = words("I would come again|I am glad I went|I loved it overall|it was worth it")
BAD_ENDS = words("I would not come again|I regret going|I hated it overall|it was not worth it")
WORKS = words("film book hotel play song restaurant museum concert")
TOPICS = {
    "music": words("guitar violin piano song melody concert drum singer choir trumpet"),
    "sports": words("football tennis referee goal stadium team race medal coach match"),
    "cooking": words("soup oven recipe sauce butter pan dough kitchen spoon salt"),
    "medicine": words("doctor patient nurse hospital fever surgery pill clinic bandage vaccine"),
    "travel": words("airport hotel luggage passport train ticket flight map border tourist"),
    "money": words("bank loan salary price tax market coin debt wallet budget"),
}
KINDS = {
    "animal": words("tiger rabbit horse eagle salmon goat sheep monkey"),
    "fruit": words("apple lemon cherry banana grape plum peach mango"),
    "tool": words("hammer saw drill wrench shovel axe chisel pliers"),
    "vehicle": words("bus truck bicycle boat train plane tractor van"),
    "instrument": words("violin guitar piano flute drum harp trumpet cello"),
    "colour": words("red green blue orange purple yellow brown pink"),
}

CITIES = words("Lisbon Vienna Oslo Cairo Lima Kyoto Dublin Prague Athens Hanoi")
