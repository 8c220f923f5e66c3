"""English words for questions: the keys of needles ("calm-lantern") and the words that cwe asks to count."""

from __future__ import annotations

from functools import cache

import numpy as np

_ADJECTIVES = """
able absent active agile alert alien amber ample ancient angry anxious arctic arid ashen astute austere awake awkward
balmy barren bashful bent bitter blank bleak blind blunt bold bony brave breezy brief bright brisk brittle broad bulky
burly busy calm candid careful casual cautious cheap cheerful chilly chubby civil classic clean clear clever close
cloudy clumsy coarse cold comfy common cool costly crafty creamy crisp crooked cruel curious curly current damp daring
dark dear decent deep dense dim dire dizzy docile dreary dry dull dusty eager early earnest easy elastic elderly
elegant empty equal exact exotic fabled faint fair faithful famous fancy fatal fearful feeble festive fickle fierce
final firm fiscal flaky flat flimsy fluffy fond foreign formal fragile frail frank fresh frosty frozen frugal full
fuzzy gaudy generous gentle giant giddy gifted glad glossy golden graceful grand grave greedy grim grumpy guilty gusty
handsome handy happy harsh hasty hazy hearty heavy helpful hidden hollow honest hostile huge humble humid hungry icy
ideal idle immune inner intact ivory jagged jealous jolly joyful juicy keen kind lanky large late lavish lawful lazy
lean lively local lofty lonely loose loud lovely loyal lucid lucky lunar lush magic major marble mean mellow merry
mighty mild minor misty mobile modern modest moist moral muddy muffled murky mute mutual naive narrow native neat
nervous nimble noble noisy normal novel numb obedient obscure odd oily open ornate outer oval pale patient peaceful
perfect petty placid plain playful plump polite poor precise pretty prime private proper proud prudent public pure
quaint quick quiet rapid rare raw ready regal remote rigid ripe robust rocky rosy rotten rough round rowdy royal
rugged rural rustic sacred sandy sane savvy scarce scenic secret sedate serene severe shabby shady shallow sharp shiny
shy silent silky simple sincere sleek slender slim slippery sloppy slow sly smart smooth snowy snug sober soft solar
solemn solid somber sour sparse spicy spiral stable stale stark steady steep sticky stiff still stormy stout strange
strict strong sturdy subtle sudden sunny superb sweet swift tall tame tangy tardy tart tender tense thick thin thirsty
thorny thrifty tidy timid tiny tired topical torn tough tranquil tricky trim trivial true trusty unique upbeat upper
urban urgent useful usual vacant vague valid vast velvet vibrant vicious vital vivid vocal warm wary watery weak
wealthy weary weekly weird wet whole wicked wide wild windy wise witty wooden worldly worthy young zesty
"""
_NOUNS = """
acorn actor airport album alley almond anchor ankle apple apron arch archer armor arrow artist atlas attic autumn axle
badge bagel baker balcony balloon bamboo banana banjo banner barley barn barrel basin basket beach beacon beak bean
bear beaver bedroom beetle bell belt bench berry bicycle bishop blanket blossom boat bonnet book boot bottle boulder
bowl bracelet branch bread brick bridge broom bucket buckle bullet butter button cabbage cabin cable cactus cake camel
camera canal candle canoe canvas canyon carpet carrot cart castle cathedral cattle cave cedar cellar chain chair chalk
chapel chariot cheese cherry chess chest chimney chisel cinema circus clock cloth cloud clover coach coast cobra
coconut coffee collar comet compass copper coral cork cottage cotton couch cousin cradle crane crayon creek cricket
crown crystal cube cupboard curtain cushion daisy dancer deck deer desert desk diamond diary doctor dolphin donkey
door dove dragon drawer dress drum eagle earring echo elbow elephant engine envelope evening falcon farmer feather
fence fern ferry fiddle field finger fire flag flame flask flower flute forest fork fossil fountain fox frame freezer
friend frog funnel galaxy garage garden garlic gate geyser ghost giraffe glacier glass globe glove goat goose grape
grass gravel guitar hammer hammock harbor harp hat hawk hazel heart hedge helmet hill honey hook horn horse hotel
house hunter iceberg igloo insect iron island jacket jar jasmine jelly jewel judge jungle kettle key king kitchen kite
kitten knife knight knot ladder ladle lady lagoon lake lamp lantern lawn leaf leather lemon leopard letter library
lighthouse lily lime lion lizard lobster locket lotus lumber machine magnet mango mantle map maple market marsh mask
meadow medal melon mirror mitten monkey moon moss moth motor mountain mouse mural museum mushroom napkin necklace
needle nest net nickel notebook nurse nutmeg oak oar oasis ocean olive onion opera orange orchard orchid organ otter
oven owl oyster paddle painter palace pan panda panther paper parade parcel parrot path peach peacock peanut pear
pebble pelican pencil penguin pepper piano picnic pigeon pillow pilot pine pirate pitcher planet plate plow plum
pocket poem poet pond pony poppy porch potato potter prairie prince prism pumpkin puppet puzzle pyramid quail quarry
queen quill quilt rabbit raccoon radio raft rail rain raven reef ribbon rice riddle ring river road robin rocket roof
room rope rose ruby rudder saddle sailor salad salmon sand scarf school scissors seal seed shadow shark sheep shelf
shell shield ship shirt shoe shore shovel silver singer skate sketch skull sled sleeve slipper snail snow soap sock
soldier soup spade sparrow spear spider spinach spoon squirrel stable stadium stair star statue steam stone stool
stove straw street sugar suitcase sunset swamp swan sweater sword table tailor teacher teapot temple tent theater
thimble thread thunder ticket tiger timber tomato tongue torch tower train trumpet trunk tulip tunnel turkey turtle
umbrella uncle valley vase vault vessel village vine violin volcano wagon wallet walnut walrus water weasel wheat
wheel whistle willow window winter wizard wolf wool worm wreath yacht yogurt zebra zipper
"""
ADJECTIVES, NOUNS = (tuple(some.split()) for some in (_ADJECTIVES, _NOUNS))


@cache
def words() -> tuple[str, ...]:
    """All words, in an arbitrary fixed order: single words first, then adjective-nouns."""
    single = sorted({*ADJECTIVES, *NOUNS})
    paired = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    rng = np.random.default_rng(0)
    return tuple([single[i] for i in rng.permutation(len(single))] + [paired[i] for i in rng.permutation(len(paired))])


def singles() -> int:
    """How many of words() are single."""
    return len({*ADJECTIVES, *NOUNS})


def pair(rng: np.random.Generator) -> str:
    """An adjective-noun."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
