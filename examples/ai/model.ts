/**
 * A model of any provider of the AI SDK, which is imported only if it is asked for:
 *
 *     npm install ai @ai-sdk/openai
 *     AI_PROVIDER=@ai-sdk/openai AI_MODEL=gpt-5 OPENAI_API_KEY=… deno run -A examples/ai/main.ts
 *
 * The provider is what its package is called, and what the package exports by that name, unless
 * another export is given: `@ai-sdk/google-vertex#vertex`.
 */

import {
  convertToModelMessages,
  generateId,
  jsonSchema,
  type LanguageModel,
  stepCountIs,
  streamText,
  tool,
  toUIMessageStream,
  type UIMessage,
} from "ai";
import type { ChatStream } from "../../ai.ts";
import type { Message } from "./message.ts";

const tools = {
  postcard: tool({
    description: "Sends a postcard",
    inputSchema: jsonSchema<{ to: string; text: string }>({
      type: "object",
      properties: { to: { type: "string" }, text: { type: "string" } },
      required: ["to", "text"],
    }),
    execute: ({ to }) => `Sent to ${to}`,
  }),
};

/** Loads the provider, and says how its model answers. */
export async function modelOf(provider: string, id: string) {
  const [from = "", name = from.split("/").at(-1)!.replace(/\.\w+$/, "")] = provider.split("#");
  const { [name]: make } = await import(from) as Record<string, (id: string) => LanguageModel>;
  if (typeof make !== "function") throw new Error(`${from} exports no function "${name}"`);
  const model = make(id);
  return async (
    { messages }: { messages: Message[] },
    signal: AbortSignal,
  ): Promise<ChatStream> => {
    const originalMessages = messages as UIMessage[];
    const { stream } = streamText({
      model,
      tools,
      toolApproval: { postcard: "user-approval" },
      stopWhen: stepCountIs(5),
      messages: await convertToModelMessages(originalMessages, { tools }),
      abortSignal: signal,
    });
    return toUIMessageStream({ stream, tools, originalMessages, generateMessageId: generateId });
  };
}
