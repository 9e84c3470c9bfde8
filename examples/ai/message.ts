/**
 * An assistant's message out of the chunks of the AI SDK's UI message stream: as much of it as this
 * example shows. The page and the server do the same with them.
 */

export interface Message {
  id: string;
  role: "user" | "assistant";
  parts: Part[];
}

/** A text, or a tool that is used: its type is "tool-" and the tool's name. */
export interface Part {
  type: string;
  text?: string;
  toolCallId?: string;
  state?: string;
  input?: unknown;
  output?: unknown;
  errorText?: string;
  approval?: { id: string; approved?: boolean };
}

/** A chunk, of which only some fields are there, by its type. */
export interface Chunk {
  readonly type: string;
  readonly messageId?: string;
  readonly id?: string;
  readonly delta?: string;
  readonly toolCallId?: string;
  readonly toolName?: string;
  readonly approvalId?: string;
  readonly input?: unknown;
  readonly output?: unknown;
  readonly errorText?: string;
}

/** Adds what the chunk says to the message. */
export function apply(message: Message, chunk: Chunk): void {
  const { parts } = message;
  const tool = parts.find(({ toolCallId }) => toolCallId && toolCallId === chunk.toolCallId);
  const set = (values: Partial<Part>) => void (tool && Object.assign(tool, values));
  switch (chunk.type) {
    case "text-start":
      return void parts.push({ type: "text", text: "" });
    case "text-delta":
      return void (parts.findLast(({ type }) => type === "text")!.text += chunk.delta!);
    case "tool-input-start":
    case "tool-input-available": {
      const state = chunk.type === "tool-input-start" ? "input-streaming" : "input-available";
      if (tool) return set({ state, input: chunk.input });
      const { toolCallId, input } = chunk;
      return void parts.push({
        type: `tool-${chunk.toolName}`,
        toolCallId: toolCallId!,
        state,
        input,
      });
    }
    case "tool-approval-request":
      return set({ state: "approval-requested", approval: { id: chunk.approvalId! } });
    case "tool-output-available":
      return set({ state: "output-available", output: chunk.output });
    case "tool-output-denied":
      return set({ state: "output-denied" });
    case "tool-output-error":
      return set({ state: "output-error", errorText: chunk.errorText! });
    case "error":
      return void parts.push({ type: "text", text: chunk.errorText! });
  }
}
