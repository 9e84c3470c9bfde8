/** How many event streams a server has, as its clients see it. */
export class StreamCount {
  /** GET requests that were answered by one. */
  gets = 0;
  now = 0;
  most = 0;

  /** The response, whose end is noticed. */
  watch(request: Request, response: Response): Response {
    if (request.method !== "GET" || !response.body) return response;
    this.gets++;
    this.most = Math.max(this.most, ++this.now);
    const reader = response.body.getReader();
    let isOver = false;
    const end = () => { // a reading that is cancelled comes to its end as well
      if (!isOver) this.now--;
      isOver = true;
    };
    const body = new ReadableStream<Uint8Array>({
      async pull(controller) {
        const { done, value } = await reader.read();
        if (!done) return controller.enqueue(value);
        end();
        controller.close();
      },
      cancel(reason) {
        end();
        return reader.cancel(reason);
      },
    }, { highWaterMark: 0 });
    return new Response(body, response);
  }
}
