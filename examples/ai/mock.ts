/**
 * A model that needs no key: it writes at a human pace, and asks before it uses its tool.
 */

import type { ChatChunk } from "../../ai.ts";
import type { Message } from "./message.ts";

/** Milliseconds for a word. */
const PACE = 40;
/** The most that it says again, in characters. */
const MAX_ECHO = 1_000;

const STORY = "Once upon a time there was an answer that took its time. It went through a proxy " +
  "that cut it after eight seconds, through a tunnel with no light at its end, through a reload, " +
  "and through a deploy on a Friday afternoon. Every time the page held its breath, and every time " +
  "the next word came, exactly the next one, neither one too many nor one too few. Nobody had to " +
  "press anything. When somebody at last pressed Stop, on a phone, in another town, the model put " +
  "down its pen at once, for an answer belongs to its chat, and not to the wire it comes by.";

export async function* mock(
  { messages, id }: { messages: Message[]; id: string },
  signal: AbortSignal,
): AsyncGenerator<ChatChunk> {
  const last = messages.at(-1);
  const tool = last?.parts.find(({ state }) => state === "approval-responded");
  const messageId = last?.role === "assistant" ? last.id : crypto.randomUUID();
  yield chunk("start", { messageId });
  try {
    if (tool) {
      const { toolCallId, approval, input } = tool;
      const to = (input as { to?: string } | undefined)?.to;
      if (approval?.approved) {
        yield chunk("tool-output-available", { toolCallId, output: `Sent to ${to}` });
        yield* say("The postcard is on its way.", signal);
      } else {
        yield chunk("tool-output-denied", { toolCallId });
        yield* say("As you wish: I have sent nothing.", signal);
      }
    } else if (/postcard/i.test(textOf(last))) {
      yield* say("I can send one, if you allow it.", signal);
      const toolCallId = crypto.randomUUID();
      const input = { to: "Ada", text: `Greetings from chat ${id.slice(0, 8)}` };
      yield chunk("tool-input-available", { toolCallId, toolName: "postcard", input });
      yield chunk("tool-approval-request", { toolCallId, approvalId: crypto.randomUUID() });
    } else {
      const said = textOf(last);
      yield* say(/story/i.test(said) ? STORY : `You said: ${said.slice(0, MAX_ECHO)}`, signal);
    }
    yield chunk("finish");
  } catch (error) {
    if (!signal.aborted) throw error;
    yield chunk("abort");
  }
}

async function* say(text: string, signal: AbortSignal): AsyncGenerator<ChatChunk> {
  const id = crypto.randomUUID();
  yield chunk("text-start", { id });
  for (const word of text.split(/(?<= )/)) {
    await pause(PACE, signal);
    yield chunk("text-delta", { id, delta: word });
  }
  yield chunk("text-end", { id });
}

function chunk(type: string, fields: object = {}): ChatChunk {
  return { type, ...fields };
}

function textOf(message: Message | undefined): string {
  return message?.parts.map(({ text = "" }) => text).join(" ") ?? "";
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", abort);
      resolve();
    }, ms);
    if (signal.aborted) abort();
    signal.addEventListener("abort", abort, { once: true });
  });
}
