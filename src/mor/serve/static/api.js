// Talking to the server: JSON, streams of events, and errors as one sentence.

const UNREACHABLE = "The server cannot be reached: is it still running?";

// No foreign site can set a header of its own, so the server takes a browser's login from us alone.
const OURS = { "x-requested-with": "depth-page" };

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...OURS } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(UNREACHABLE);
  }
  if (response.ok) return response;
  let said;
  try {
    said = (await response.json()).error.message;
  } catch {
    said = `The server answers ${response.status} ${response.statusText}.`;
  }
  throw new Error(said);
}

/** The JSON value at a path. */
export async function get(path) {
  return (await send(path, { headers: { accept: "application/json" } })).json();
}

/** Events of a streamed completion, as objects; throws what the server says is wrong. */
export async function* complete(body, signal) {
  const response = await send("v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection to the server broke off.");
    }
    if (part.done) throw new Error("The server ended the stream before it was done.");
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** What a choice of a streamed completion adds: its tokens, those of the prompt first. */
export class TokenReader {
  // A token can end inside a character, which is then shown with the token that completes it.
  #decoder = new TextDecoder();
  #encoder = new TextEncoder();

  read(choice) {
    const names = choice.logprobs?.tokens ?? [];
    const prompt = choice.prompt_token_ids ?? [];
    const ids = [...prompt, ...choice.token_ids];
    const counts = [...(choice.prompt_recursion_counts ?? []), ...choice.recursion_counts];
    const tokens = ids.map((id, i) => ({
      id,
      text: this.#decoder.decode(this.#bytes(names[i] ?? ""), { stream: true }),
      count: counts[i],
      logprob: choice.logprobs?.token_logprobs[i] ?? null,
      isPrompt: i < prompt.length,
    }));
    const last = tokens.at(-1);
    if (last && choice.finish_reason) {
      if (choice.finish_reason === "stop" && choice.text === "") last.text = "";
      else last.text += this.#decoder.decode();
      last.isEnd = choice.finish_reason === "stop";
    }
    return tokens;
  }

  #bytes(name) {
    const hex = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(name);
    if (!hex) return this.#encoder.encode(name);
    return Uint8Array.from(hex[1].split("\\x").slice(1), (pair) => parseInt(pair, 16));
  }
}
