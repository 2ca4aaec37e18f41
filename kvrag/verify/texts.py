"""The built-in text set: questions that only their passages can answer.

Every name, place and figure is invented, so that no model knows an answer by heart. Most questions
need two passages, and the passages lean on one another ("the keeper named above", "that year"), so
that what a chunk says depends on the chunks before it: stored KV, which has not seen them, is then
wrong where it matters. The first two are the shortest, and their first three passages suffice: they
are what the short form asks.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TEXTS", "Text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A question, its passages as (title, text), and words of the answer that stand in them."""

    question: str
    passages: tuple[tuple[str, str], ...]
    answer: str


TEXTS: tuple[Text, ...] = (
    Text(
        "In which month is the bell of Orvik rung by the daughter of the glassmaker?",
        (
            (
                "The bell of Orvik",
                "The bell of Orvik hangs in a wooden tower above the harbour. It is rung on one "
                "night of the year alone, when the first herring boats come home. Whoever holds "
                "the copper key that year must pull the rope forty times before the boats are "
                "tied up. The rope is as thick as an arm.",
            ),
            (
                "The copper key",
                "Each spring the key is drawn by lot among the families of the lower street. "
                "Last spring it went to Tamsin Oldroyd, whose father blows glass behind the "
                "fish market. She keeps it on a nail beside the furnace and lets nobody else "
                "touch it. It weighs as much as a loaf.",
            ),
            (
                "The herring boats",
                "Six boats leave Orvik when the ice breaks. They follow the herring north along "
                "the Sallow Banks and are away for most of the summer. The first of them is "
                "seen from the tower in September, never before the apples are ripe. The crews "
                "bet a barrel of cider on who will be seen first.",
            ),
            (
                "The old ferry",
                "Before the bridge was built, a ferry crossed from Orvik to the saltworks. Its "
                "bell was smaller than the one in the tower and cracked in a frost. The "
                "ferryman sold it in August to a school in the hills, where it still calls the "
                "children. Nobody in the town has answered it since.",
            ),
        ),
        "September",
    ),
    Text(
        "How many pages did the mapmaker lose before she reached the monastery?",
        (
            (
                "Ilse Varga sets out",
                "The mapmaker Ilse Varga left Dunmere with two mules and a book of ninety blank "
                "pages. She meant to draw every bridge of the Carrow valley. By the third week "
                "she had filled half of the book and sold one of the mules for bread.",
            ),
            (
                "The flood at Low Carrow",
                "At Low Carrow the river rose at night and came into the barn where she slept. "
                "The other mule swam to the far bank. The book was found at dawn under a cart; "
                "twelve pages had come out of it and were never seen again. The farmer gave her "
                "his own boots and would take nothing for them.",
            ),
            (
                "The monastery",
                "Nine days later she knocked at the gate of Saint Bruna. The monks dried what "
                "was left of the book before their oven and gave her ink. In return she drew "
                "them a map of their own fish ponds, which hangs in the kitchen. The book had "
                "no further losses while it was there, though a goat tried hard.",
            ),
            (
                "After the winter",
                "In spring the abbot bought five of her pages for the library. She used the "
                "money for a boat and went on down the valley as far as the sea. The finished "
                "atlas has seventy-three bridges and one drawing of a mule. It lies open in the "
                "town hall of Dunmere to this day.",
            ),
        ),
        "twelve",
    ),
    Text(
        "Who repaired the telescope that saw the comet of Hallow's year?",
        (
            (
                "Hallow's year",
                "Astronomers of the Tern Islands count their years from the death of the "
                "admiral Josefa Hallow. In the first of them a comet with two tails stood over "
                "the southern cape for eleven nights. Only one instrument on the islands was "
                "strong enough to show that the tails were of different colours, and it had "
                "been out of use for most of a decade. A fisherman's wife noticed it first and "
                "thought that her chimney was on fire.",
            ),
            (
                "The great refractor",
                "The great refractor stands on Mount Pell. Its front lens cracked when "
                "lightning struck the dome, and the observatory had no money for another. The "
                "tube was used as a rain gutter until the winter before the admiral's death, "
                "when a retired spectacle maker from the village asked for the pieces. The "
                "parish had already agreed to melt the brass for a font. He came with a "
                "wheelbarrow and took two trips.",
            ),
            (
                "Benno Achterberg",
                "Benno Achterberg had ground spectacles in the village below Mount Pell for "
                "forty years. When he retired he was bored within a month. He glued the broken "
                "lens with pine resin, polished it through one whole winter, and took no "
                "payment but the right to look through it once a week. The village still tells "
                "how the kitchen smelled, and how his cat slept on the dome's motor because it "
                "was warm.",
            ),
            (
                "The small reflector",
                "A smaller instrument stands on the cape. It was given by a shipping company "
                "and has a mirror the size of a dinner plate. Its keeper, Odile Marchetti, "
                "cleans it each Sunday. It was pointed at the comet too, but showed nothing but "
                "a white blur above the water. When clouds came on the fourth night she is said "
                "to have shaken her broom at the sky. The shipping company asks every year for "
                "a photograph and has never been sent one.",
            ),
            (
                "What was seen",
                "The report of those eleven nights was written by three students who slept in "
                "the dome. One tail, they say, was blue and straight, the other yellow and bent "
                "like a sickle. They thank the spectacle maker by name on the last page and "
                "forgive him the smell of resin. A copy hangs in the harbour office. The "
                "original was eaten by mice, but for the page with the thanks, which had been "
                "varnished.",
            ),
        ),
        "Benno Achterberg",
    ),
    Text(
        "What does the winner of the Kettle Race receive if it is won by someone from Ashby?",
        (
            (
                "The Kettle Race",
                "On the shortest day of the year the villages of Ashby, Corran and Little Mote "
                "race one another down Kettle Hill. Each runner carries a full kettle of tea. "
                "The one who arrives first with at least half of it wins, and must drink what "
                "is left before anybody may congratulate. The custom is older than tea in those "
                "parts: the oldest accounts speak of broth.",
            ),
            (
                "The prizes",
                "There are three prizes and the village of the winner decides which is given. A "
                "runner from Corran receives a goose. A runner from Little Mote receives the "
                "right to graze a cow on the common. For the third village the rule is older "
                "and stands in the parish book alone. The clerk who looks after the prizes must "
                "come from a fourth village, so that nobody can say he was bought.",
            ),
            (
                "The parish book",
                "In the parish book, under the year of the great wind, the clerk wrote that a "
                "winner of Ashby shall have neither goose nor grass, since Ashby has enough of "
                "both, but a new pair of boots from the cobbler of Corran, and that the cobbler "
                "shall not complain. The entry is signed by two witnesses, of whom one could "
                "not write and drew a kettle instead. It has been read aloud at every race "
                "since.",
            ),
            (
                "The cobbler",
                "The cobbler of Corran has complained every time. His grandfather made the "
                "boots too small on purpose, and the winner wore them on his hands to church. "
                "Since then the feet are measured before the race, in front of witnesses. His "
                "shop has a window full of shoes that nobody fetched, and a sign that says he "
                "mends everything but tempers.",
            ),
            (
                "Last winter",
                "Last winter the hill was ice from top to bottom. Eleven kettles were lost and "
                "the race was won by Maud Tansley of Ashby, who sat down on hers and slid. The "
                "judges weighed the tea twice before they agreed. She had practised on the roof "
                "of the barn with a pan of soup, which her brother denied until he was shown "
                "the dent in the gutter.",
            ),
        ),
        "boots",
    ),
    Text(
        "Which colour did the second ship of the Merrow line have after it was sold?",
        (
            (
                "The Merrow line",
                "The Merrow line ran three ships between Port Sable and the Lantern Isles. The "
                "first was the Patience, built of oak. The second was the Gannet, the only one "
                "with a steam engine. The third was never finished and lay for years on the "
                "slipway with birches growing through its ribs. A painting in the customs hall "
                "shows the first two side by side in a calm, with a dog on the deck of each.",
            ),
            (
                "The colours of the line",
                "All ships of the line were painted green up to the rail and white above it. "
                "The founder, Abel Merrow, mixed the green himself from copper and linseed and "
                "left the recipe to his son, who could not read it and ordered ordinary paint "
                "from the mainland. The difference could be seen only at noon. Old captains "
                "said they felt it in their teeth all the same, and refused to sail on Fridays.",
            ),
            (
                "The sale",
                "When the son had gambled the line away, the steamship was sold to the customs "
                "office. Customs boats of that coast must be seen from far off, so they are red "
                "from the waterline to the funnel. The oak ship went to a fishmonger, who left "
                "it as it was. The papers were signed in a tavern, and the ink ran because the "
                "table was wet. The lamp room of the steamship was filled with confiscated "
                "brandy.",
            ),
            (
                "The Patience today",
                "The oldest ship of the line is a restaurant now. It lies in the inner basin of "
                "Port Sable and has kept its green and white. On windy evenings the soup moves "
                "in the plates and the waiter says that the sea was always included in the "
                "price. Children may ring the ship's bell on their birthdays, twice, but not "
                "while fish is being carried. The cook was once a pilot.",
            ),
            (
                "A wreck",
                "Divers found a funnel off the Lantern Isles in thirty metres of water. Its "
                "paint had come off but for a hand's breadth, by which the harbour museum knew "
                "at once which office the ship had served when it went down. They also brought "
                "up a brass lamp, a bottle without a label and a shoe that fitted none of them.",
            ),
        ),
        "red",
    ),
    Text(
        "Why was the clock of Vennbury stopped by the woman who had wound it for thirty years?",
        (
            (
                "The clock",
                "The town hall of Vennbury has a clock with a single hand. It was made by a "
                "blacksmith who thought that nobody needs to know the minutes. It has to be "
                "wound each morning, which takes a quarter of an hour and a strong back, and "
                "the town pays for it with firewood. Strangers take it for broken and are told "
                "that it is only patient. On market days the hand is decorated with ribbon.",
            ),
            (
                "The winder",
                "For thirty years the clock was wound by Petra Lindholm, who lived in the room "
                "below it. She knew its moods, oiled it with walnut oil and was never late. She "
                "asked the council for nothing, until the summer in which the swifts came. Her "
                "pupils at the evening school learned to count by the strokes that came through "
                "the ceiling.",
            ),
            (
                "The swifts",
                "That summer a pair of swifts nested between the great wheel and the wall. Each "
                "turn of the wheel shook the nest, and one of the eggs had already fallen. The "
                "young would need six weeks before they could fly, and the council was to meet "
                "only in autumn. Swifts come back to the same place every year if nothing "
                "disturbs them, said the book that she borrowed from the pharmacist.",
            ),
            (
                "Six weeks",
                "One morning the hand stood at seven and did not move again until the end of "
                "August. Trains were missed, and the baker sold warm bread at noon. When the "
                "mayor climbed the tower to complain, he was shown four open beaks and went "
                "down again on tiptoe. He told nobody what he had seen, but sent up a ladder "
                "and a bowl of water.",
            ),
            (
                "The blacksmith's heirs",
                "The heirs of the blacksmith still live in Vennbury and have sued the town "
                "three times, because of the hand, the bell and the firewood. They lost each "
                "time. About the stopped clock they said only that it had never been so "
                "punctual, twice a day. Their lawyer was paid in firewood, which he did not "
                "find funny. He has moved to the coast and collects sundials.",
            ),
            (
                "The council's decision",
                "In autumn the council met after all. It decided that the clock shall stand "
                "still in every year in which there are eggs in the tower, and that whoever "
                "winds it shall have her firewood all the same. The vote was eleven to one. The "
                "one was the baker, who changed his mind when the bread was praised.",
            ),
        ),
        "swifts",
    ),
    Text(
        "How deep is the lake in which the stone of the treaty lies?",
        (
            (
                "The treaty of Grell",
                "The people of the upper and of the lower valley fought over a mill for three "
                "generations. When the mill burned down there was nothing left to fight for, "
                "and a treaty was cut into a grey stone that six oxen could hardly move. The "
                "oxen were paid for by both sides, three each, so that nobody could boast of it "
                "afterwards.",
            ),
            (
                "Where the stone went",
                "Neither valley wanted the other to keep the stone. So it was drawn onto the "
                "ice of Lake Immer in January, with drums and torches, and left there. In March "
                "the ice broke. Both sides heard it and both were content. An old woman of the "
                "lower valley is said to have danced on the stone before the ice gave way, and "
                "to have gone home without getting her feet wet.",
            ),
            (
                "Three lakes",
                "There are three lakes in the two valleys. Lake Tosk is shallow enough to be "
                "crossed on foot in a dry year. Lake Hollin is forty metres deep near the dam. "
                "The third, the one between the valleys, was measured by a schoolteacher with a "
                "cord and a flat iron: she counted sixty-eight metres. She wrote the figure on "
                "the wall of the boathouse, where it can still be read, and drew a fish below "
                "it for scale.",
            ),
            (
                "The schoolteacher",
                "The teacher's name was Runa Feld. She also measured the height of the church "
                "by its shadow and the speed of the postman by his whistle. Her notebook lists "
                "fifteen wells, nine caves and, crossed out in red, the length of the sermon. "
                "She taught for fifty years in a room with one stove and two doors, so that the "
                "children of each valley could enter by their own.",
            ),
            (
                "The mill today",
                "A new mill was built by a stranger from the coast, who knew nothing of the "
                "war. It grinds for both valleys. Over its door he hung a sign that says, in "
                "the words of the treaty, that water belongs to whoever is thirsty. The flour "
                "is sold in sacks of two colours, grey and white, but what is in them is the "
                "same. The stranger has learned to say good morning in both dialects.",
            ),
        ),
        "sixty-eight",
    ),
    Text(
        "Who inherited the violin that was made from the pear tree of Quill House?",
        (
            (
                "The pear tree",
                "A pear tree stood in the yard of Quill House for two hundred years. When it "
                "fell in a storm, its trunk was given to the instrument maker Severin Dahl in "
                "place of the rent that the house owed him for a cello. He let it dry for nine "
                "years. The children of the house had names for each of its branches and cried "
                "for a week. The pears had never been good.",
            ),
            (
                "Two violins",
                "Severin Dahl made two violins in his last winter. One is of maple, as violins "
                "are, and has a lion's head. The other is of pear wood, darker than honey, with "
                "a plain scroll. He sold the one with the lion and kept the plain one for "
                "himself. A dealer from the city offered him a horse for it, and later a horse "
                "and a carriage, and went home with neither.",
            ),
            (
                "The will",
                "In his will the maker left his tools to the guild, his debts to the brewery, "
                "and the violin with the plain scroll to the pupil who had swept his floor, a "
                "deaf boy by the name of Anselm Roke, because he alone had never asked how it "
                "sounds. The notary read the sentence twice, since he thought that he had "
                "misheard it. The guild sent a wreath in the form of a bow.",
            ),
            (
                "The lion's head",
                "The maple violin was bought by the conductor Beatrix Noor. She played it in "
                "eleven countries and lost it in a railway station. It was handed in the same "
                "evening by a porter who had taken the lion for a dog. She bought the porter a "
                "concert ticket for every year of his life, of which he used the first and gave "
                "the others to his aunt.",
            ),
            (
                "The boy",
                "The boy felt the strings with his teeth and learned to tune them so. He became "
                "the best repairer of bows on the coast. The instrument hangs in his workshop "
                "and is lent to anyone who can tell him which tree it was. Two people have "
                "guessed it so far: a gardener, by the smell, and a child who said that it "
                "looked like something one could eat.",
            ),
        ),
        "Anselm Roke",
    ),
)
