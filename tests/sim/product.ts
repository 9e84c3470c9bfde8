/** What is tested: as the repository has it, or with a bug planted in it. */
import { WebSocketSSE } from "../../client.ts";
import { cluster } from "../../cluster.ts";
import { sseAdapter } from "../../server.ts";

export interface Product {
  WebSocketSSE: typeof WebSocketSSE;
  sseAdapter: typeof sseAdapter;
  cluster: typeof cluster;
}

export const PRODUCT: Product = { WebSocketSSE, sseAdapter, cluster };
