// Tool calls, responses and messages with the JavaScript clients:
//   npm install openai @anthropic-ai/sdk
//   node tool_calls.mjs http://127.0.0.1:8000 MODEL
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";
import assert from "node:assert";

const [url, model] = process.argv.slice(2);
const schema = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const fn = { name: "get_weather", description: "The weather now.", parameters: schema };
const ask = "What is the weather in Oslo?";
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });

const chat = {
  model,
  messages: [{ role: "user", content: ask }],
  tools: [{ type: "function", function: fn }],
  tool_choice: "required",
  parallel_tool_calls: false,
  temperature: 0,
  max_tokens: 100,
};
const whole = await openai.chat.completions.create(chat);
const called = whole.choices[0].message.tool_calls[0].function.arguments;
const joined = await openai.chat.completions.stream(chat).finalChatCompletion();
assert.equal(joined.choices[0].message.tool_calls[0].function.arguments, called);
console.log("openai chat:", called);

const stream = openai.responses.stream({
  model,
  input: ask,
  tools: [{ type: "function", ...fn, strict: true }],
  tool_choice: "required",
  parallel_tool_calls: false,
  temperature: 0,
  max_output_tokens: 100,
  store: false,
});
const response = await stream.finalResponse();
assert.ok(JSON.parse(response.output[0].arguments).city !== undefined);
console.log("openai responses:", response.output[0].arguments);

const anthropic = new Anthropic({ baseURL: url, apiKey: "none-needed" });
const message = await anthropic.messages
  .stream({
    model,
    max_tokens: 100,
    messages: [{ role: "user", content: ask }],
    tools: [{ name: fn.name, description: fn.description, input_schema: schema }],
    tool_choice: { type: "any", disable_parallel_tool_use: true },
  })
  .finalMessage();
assert.equal(message.stop_reason, "tool_use");
console.log("anthropic:", JSON.stringify(message.content[0].input));
