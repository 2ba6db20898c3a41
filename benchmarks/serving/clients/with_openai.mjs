// OpenAI's client for Node; see ../clients.py.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const facts = JSON.parse(process.env.REDWOOD_FACTS)
const require = createRequire(pathToFileURL(`${process.cwd()}/package.json`))
const OpenAI = (await import(pathToFileURL(require.resolve('openai')))).default
const { version } = JSON.parse(readFileSync('node_modules/openai/package.json', 'utf8'))
const { plain: PLAIN, stop: STOP, seeded: SEEDED, model } = facts
const make = (apiKey) => new OpenAI({ baseURL: `${facts.url}/v1`, apiKey, maxRetries: 0 })
const chat = make(facts.key).chat.completions
const long = { model, messages: [{ role: 'user', content: 'Count up.' }], ignore_eos: true }

async function waitRows(wanted) {
  const start = Date.now()
  for (;;) {
    const answer = await fetch(`${facts.url}/metrics`, {
      headers: { authorization: `Bearer ${facts.key}` },
    })
    const lines = (await answer.text()).split('\n')
    const rows = lines
      .filter((line) => /^redwood:num_requests_(running|waiting) /.test(line))
      .reduce((sum, line) => sum + Number(line.split(' ')[1]), 0)
    if (rows > 0 === wanted) return (Date.now() - start) / 1000
    assert.ok(Date.now() - start < (wanted ? 10000 : 2000), `rows in use: ${rows}`)
    await new Promise((go) => setTimeout(go, 20))
  }
}

async function read(body) {
  const pieces = []
  for await (const piece of await chat.create({ model, stream: true, ...body })) pieces.push(piece)
  return pieces
}

const checks = {
  plain: async () => {
    const answer = await chat.create({ model, ...PLAIN.body })
    assert.equal(answer.choices[0].message.content, PLAIN.texts[0])
  },
  stream: async () => {
    const pieces = await read(PLAIN.body)
    const text = pieces.map((piece) => piece.choices[0].delta.content ?? '').join('')
    assert.equal(text, PLAIN.texts[0])
  },
  usage: async () => {
    const answer = await chat.create({ model, ...PLAIN.body })
    assert.equal(answer.usage.completion_tokens, PLAIN.num_tokens)
    const pieces = await read({ ...PLAIN.body, stream_options: { include_usage: true } })
    assert.equal(pieces.at(-1).usage.completion_tokens, PLAIN.num_tokens)
  },
  stop: async () => {
    const [choice] = (await chat.create({ model, ...STOP.body })).choices
    assert.deepEqual([choice.message.content, choice.finish_reason], [STOP.texts[0], 'stop'])
  },
  'seeds, n': async () => {
    const { choices } = await chat.create({ model, ...SEEDED.body })
    assert.deepEqual(choices.map((choice) => choice.message.content), SEEDED.texts)
  },
  error: async () => {
    const wrong = chat.create({ model, ...PLAIN.body, temperature: 9 })
    await assert.rejects(wrong, (e) => e instanceof OpenAI.BadRequestError && /temperature/.test(e))
    const none = chat.create({ model: 'none', ...PLAIN.body })
    await assert.rejects(none, (e) => e instanceof OpenAI.NotFoundError)
  },
  'bad key': async () => {
    const answer = make('wrong').chat.completions.create({ model, ...PLAIN.body })
    await assert.rejects(answer, (e) => e instanceof OpenAI.AuthenticationError)
  },
  cancel: async () => {
    const stream = await chat.create({ ...long, stream: true })
    let seen = 0
    for await (const _ of stream) if (++seen === 3) break
    const streamed = await waitRows(false)
    const leaving = new AbortController()
    const whole = chat.create(long, { signal: leaving.signal })
    const ended = assert.rejects(whole, (e) => e instanceof OpenAI.APIUserAbortError)
    await waitRows(true)
    leaving.abort()
    await ended
    return `rows free after ${streamed} s, whole ${await waitRows(false)} s`
  },
}

console.log(JSON.stringify({ version }))
for (const [check, run] of Object.entries(checks)) {
  try {
    console.log(JSON.stringify({ check, ok: true, note: (await run()) ?? '' }))
  } catch (error) {
    console.log(JSON.stringify({ check, ok: false, note: String(error.stack).slice(0, 1500) }))
  }
}
