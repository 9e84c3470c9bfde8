/**
 * Event streams as chunks, of the kinds that eventsource-parser's benchmark
 * uses: chat completions, named events, keep-alives, lines in drips and lines
 * of many parts.
 *
 * @module
 */

const WORDS = "the quick brown fox jumps over a lazy dog while tokens arrive one at a time".split(
  " ",
);
const LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
const FOREIGN = [
  "我能吞下玻璃而不伤身体。",
  "Ég get etið gler án þess að meiða mig. 🧊",
  "Я могу есть стекло, оно мне не вредит. 👩‍👩‍👧‍👦",
  "أنا قادر على أكل الزجاج و هذا لا يؤلمني. 🏳️‍🌈",
];

function word(): string {
  return WORDS[Math.floor(Math.random() * WORDS.length)]!;
}

function letters(length: number): string {
  return Array.from({ length }, () => LETTERS[Math.floor(Math.random() * LETTERS.length)]).join("");
}

function times<T>(count: number, make: (i: number) => T): T[] {
  return Array.from({ length: count }, (_, i) => make(i));
}

/** Cuts a text anywhere, into pieces of this length on average. */
function drips(text: string, average: number): string[] {
  const pieces: string[] = [];
  for (let at = 0; at < text.length;) {
    const length = 1 + Math.floor(Math.random() * (2 * average - 1));
    pieces.push(text.slice(at, at += length));
  }
  return pieces;
}

const completion = (content: string) =>
  `data: ${
    JSON.stringify({
      id: "id-0123456789abcdefghijklmn",
      object: "chat.completion.chunk",
      created: 1234567890,
      model: "some-model",
      choices: [{ index: 0, delta: { content }, finish_reason: null }],
    })
  }\n\n`;

const delta = (text: string) =>
  `event: block-delta\ndata: ${
    JSON.stringify({ type: "block-delta", index: 0, delta: { type: "text-delta", text } })
  }\n\n`;

/** Each as the chunks that a parser is given. */
export function inputs(): Record<string, string[]> {
  const completions = times(128, () => completion(word())).join("");
  return {
    "data only": times(256, () => completion(word())),
    "named events": times(128, () => delta(word())),
    "with ids": times(128, (i) => `id: ${i}\nevent: tick\ndata: {"text":"${word()}"}\n\n`),
    "many bytes a character": times(128, (i) => `data: ${FOREIGN[i % 4]} ${FOREIGN[i % 3]}\n\n`),
    "heartbeats": times(320, (i) => i % 5 < 4 ? ": keep-alive\n" : `data: ${word()}\n\n`),
    "idle, one character a chunk": [...times(512, () => ":"), "\ndata: finally\n\n"],
    "no field, one character a chunk": ["n", ...times(512, () => "o"), "\ndata: finally\n\n"],
    "a line of 256 KB in drips of 4": drips(`data: ${letters(256 * 1024)}\n\n`, 4),
    "drips of 8": drips(completions, 8),
    "an event of 500 lines": [times(500, () => `data: ${letters(80)}\n`).join("") + "\n"],
    "every line ending": [
      "id: 1\r\nevent: greet\r\ndata: hello\r\n\r\n",
      "event: split\r\ndata: in the ending\r",
      "\n\r\n",
      "event: lines\ndata: one\ndata: two\ndata: three\n\n",
      ": comment\n: another\n",
      "event: cr\rdata: a\rdata: b\r\r",
      "retry: 1500\nunknown: ignored\n\nev",
      "ent: cut\nda",
      "ta: anywhere\n\nevent: last\ndata: end",
      "\n",
      "\n",
    ],
    "one chunk of 128 messages": [completions],
  };
}
