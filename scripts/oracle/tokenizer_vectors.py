#!/usr/bin/env python3
"""Token ids of Hugging Face's `tokenizers` for tests/data/tokenizer: texts.json, and one file of ids per vocabulary.

    tokenizer_vectors.py FALCON_TOKENIZER_JSON OUT_DIR

FALCON_TOKENIZER_JSON is the tokenizer.json of tiiuae/falcon-7b or falcon-mamba-7b (same vocabulary). The tiny
model's is taken from tests/data/tiny-falcon-mamba; `neox` is that vocabulary with GPT-NeoX's normalizer and
pre-tokenizer. Needs `tokenizers`. Deterministic.
"""
import json, random, sys
from pathlib import Path
import tokenizers

SCRIPTS = """
The quick brown fox jumps over the lazy dog.|Voix ambiguë d'un cœur qui préfère les jattes de kiwis|Falsches Üben von Xylophonmusik quält jeden größeren Zwerg
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia|Příliš žluťoučký kůň úpěl ďábelské ódy|Pchnąć w tę łódź jeża lub ośm skrzyń fig
Съешь же ещё этих мягких французских булок, да выпей чаю|Жебракують філософи при ґанку церкви в Гадячі|Ξεσκεπάζω την ψυχοφθόρα βδελυγμία
דג סקרן שט בים מאוכזב ולפתע מצא חברה|نص حكيم له سر قاطع وذو شأن عظيم|بر اثر چنین تلقین و شستشوی مغزی|ऋषियों को सताने वाले दुष्ट राक्षसों के राजा
আমি বাংলায় গান গাই|தமிழ் மொழி மிகவும் பழமையானது|తెలుగు భాష|ಕನ್ನಡ ನಾಡು|മലയാളം ഭാഷ|ਪੰਜਾਬੀ ਬੋਲੀ|ગુજરાતી ભાષા|සිංහල භාෂාව
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า|ພາສາລາວ ງາມ|မြန်မာဘာသာစကား|ភាសាខ្មែរ|བོད་སྐད་|ქართული ენა|Հայերեն լեզու|አማርኛ ቋንቋ
いろはにほへと ちりぬるを|色は匂へど散りぬるを|ｱｲｳｴｵ カタカナ|我能吞下玻璃而不伤身体。|我能吞下玻璃而不傷身體。|키스의 고유조건은 입술끼리 만나야 하고|한국어
Tiếng Việt rất đẹp|ᠮᠣᠩᠭᠣᠯ|ꦧꦱꦗꦮ|ᏣᎳᎩ|ⵜⴰⵎⴰⵣⵉⵖⵜ|𐌰𐌽𐌰 𐌲𐌿𐍄𐌹𐍃𐌺|𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒻𝑜𝓃𝓉𝓈 𝟙𝟚𝟛|ℕ ⊆ ℤ ⊂ ℚ, ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋|ﬁ ﬂ ﬃ Ǆ ǅ ǆ
"""
OTHERS = [
    "", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u00a0", "\u2003\u2009", "\u3000", "\u200b", "\ufeff", "\u0085", "\u2028", "a\u00a0b", "a  b",
    "a   b    c", "  leading", "trailing   ", " \t mixed \t \n\n  whitespace \r\n\r\n\t\tend ", "tab\tand  \n  newline\n\n\n three", "\n\n  indented\n\n", "x\u3000\u3000y  z",
    "0", "1", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890", " 1", " 12 345", "3.14159", "1,000,000.00", "2024-11-24T01:30:00Z", "0x1F600", "1e-10", "v1.2.3", "192.168.1.1", "+1 (555) 010-9999",
    "٠١٢٣٤٥", "०१२३४५", "１２３４５", "一二三", "Ⅷ Ⅻ", "①②③", "x²", "²", "³", "¹", "²³¹", "x²y³z¹", "¼ ½ ¾", "¼½¾", "m² and cm³", "10² = 100", "²2²22²222", "a²b", "ª º", "H₂O CO₂", "10⁹", "e⁻¹", "1²3", "½½½½", "5½", "§²", "«²»", "¡¹!", "n°5",
    "'s 't 're 've 'm 'll 'd", "it's we're I've I'm they'll he'd", "IT'S WE'RE", "don't", "''''", "l'été d'un", "rock 'n' roll", "’s “quoted” ‘single’",
    "!!!", "?!?!", "...", "…", "---", "a-b_c", "$100", "€50 £20 ¥3", "a+b=c", "<tag attr=\"v\">", "x^2|y~z`w`", "a && b || !c", "#hashtag @user", "50%", "foo(bar)[baz]{qux}", "==!=<=>=", "$$$", "+++", "<<<>>>", "^^", "~~", "`code`", "||", "a$b", "¡Hola! ¿Qué?", "。、「」", "—–‐", "•·‣", "©®™", "°C", "±∓×÷", "←→⇒", "★☆", "♪♫",
    "😀", "😀😃😄", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷🇯🇵", "❤️", "☺", "🦙.cpp", "a😀b", " 😀 ", "1️⃣2️⃣", "🧑🏿‍🚀 goes 🚀", "🤷‍♀️?!", "\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1", "e\u0301", "\u00e9", "e\u0301 \u00e9", "n\u0303o\u0308", "\u1e9b\u0323", "한", "\u1112\u1161\u11ab", "\u212b \u00c5 A\u030a", "Z\u0335a\u0336l\u0337g\u0338o", "\u0301", " \u0301x",
    "\x00", "a\x00b", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\u0080\u009f", "\ufffd", "\ufffe", "\U0010ffff", "\u202eRTL\u202c", "\u00ad", "soft\u00adhyphen", "\ue000", "Ġ", "Ċ", "ĠaĊb", "Ã©", "Â²", "ÿþ",
    "def f(x):\n    return x ** 2  # square\n", "#include <stdio.h>\nint main(void) {\n\tprintf(\"%d\\n\", 42);\n}\n", "fn main() { let v: Vec<u8> = vec![0; 1024]; }", "SELECT * FROM t WHERE a >= 10 AND b != 'x';", "<html>\n  <body class=\"a b\">&nbsp;</body>\n</html>", "{\"k\": [1, 2.5, null, true]}", "for (int i=0;i<100;++i){a[i]=i*i;}", "\\begin{equation} \\sum_{i=1}^{n} x_i^2 \\end{equation}", "https://example.org/a?b=c&d=%20#e", "C:\\Users\\x\\file.txt", "user@example.com", "git commit -m \"fix: #123\"", "0b1010 0o777 0xDEADBEEF", "camelCaseIdentifier snake_case_name SCREAMING_CASE", "        eight spaces", "\t\t\ttabs", "if x:\n\tpass\n\n\n\nelse:\n    y", "a;b;c;;", "//// comment ////", "/* c */", "<!-- x -->", "```rust\nlet x = 1;\n```",
    "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|endoftext|", "|endoftext|>", "<|ENDOFTEXT|>", ">>TITLE<<", ">>TITLE<<>>ABSTRACT<<", "Hello >>QUESTION<< what? >>ANSWER<< this.", ">>PREFIX<<def>>SUFFIX<<end>>MIDDLE<<", ">>TITLE<", ">>>TITLE<<<", ">>DOMAIN<<1234", "<|im_start|>user\nhi<|im_end|>\n", "<|begin_of_text|>x", "assistant", "the assistant said", "[PAD1]", "<unk> <s> </s>", ">>SUMMARY<<\n\n>>COMMENT<< ²",
    "A" * 100, "a" * 1000, " " * 100, "\n" * 50, "." * 64, "0" * 100, "ab" * 200, "🦙" * 20, "é" * 50, "\t " * 30, "-=" * 40, "the " * 100, "Donaudampfschifffahrtsgesellschaftskapitän", "pneumonoultramicroscopicsilicovolcanoconiosis", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "HELLO hello HeLLo", "İstanbul ışık", "ǅungla", "ſtraſse", "ß SS",
]


def random_texts(n):
    rng = random.Random(20241124)
    parts = ["a", "Z", "the", " of", "ing", " ", "  ", "\n", "\t", "1", "23", "456", "7890", "²", "³", "¼", "é", "ß", "Ж", "中", "ｶ", "🦙", "\u200d", "\u0301", ".", ",", "!", "$", "+", "<", "=", "^", "|", "~", "`", "'", "'s", "'ll", "\"", "-", "_", "(", ")", ">>TITLE<<", "<|endoftext|>", "\u00a0", "\u3000", "\x00", "٣", "Ⅷ", "한", "ก็", "क्ष", "Ġ", "½", "°", "€"]
    return ["".join(rng.choice(parts) for _ in range(rng.randint(2, 40))) for _ in range(n)]


def random_unicode(n):
    rng = random.Random(7)
    def char():
        top = rng.choice([0x80, 0x250, 0x3000, 0xD000, 0x20000])
        c = rng.randrange(top)
        return chr(c) if not 0xD800 <= c < 0xE000 else "\ue000"  # surrogates are no characters
    return ["".join(char() for _ in range(rng.randint(1, 30))) for _ in range(n)]


def main():
    falcon_path, out = sys.argv[1], Path(sys.argv[2])
    tiny = json.loads((Path(__file__).parents[2] / "tests/data/tiny-falcon-mamba/tokenizer.json").read_text())
    texts = [t for line in SCRIPTS.strip().split("\n") for t in line.split("|")] + OTHERS
    texts += random_texts(120) + random_unicode(60)
    neox = dict(tiny, normalizer={"type": "NFC"},
                pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True})
    vocabularies = {"falcon": Path(falcon_path).read_text(), "tiny": json.dumps(tiny), "neox": json.dumps(neox)}
    dump = lambda x: json.dumps(x, ensure_ascii=True, separators=(",", ":"))
    (out / "texts.json").write_text("[\n" + ",\n".join(dump(t) for t in texts) + "\n]\n")
    for name, text in vocabularies.items():
        tokenizer = tokenizers.Tokenizer.from_str(text)
        special = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        tokenizer.encode_special_tokens = True
        plain = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        lines = ",\n".join(dump([s] if s == p else [s, p]) for s, p in zip(special, plain))
        (out / f"ids-{name}.json").write_text("[\n" + lines + "\n]\n")
    print(len(texts), "texts,", len(set(texts)), "different; tokenizers", tokenizers.__version__)


main()
